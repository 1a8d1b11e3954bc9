#define MPLUG2_ISA avx512
#include "linear_cross_entropy/linear_cross_entropy_rows.h"
