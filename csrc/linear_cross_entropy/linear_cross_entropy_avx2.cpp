#define MPLUG2_ISA avx2
#include "linear_cross_entropy/linear_cross_entropy_rows.h"
