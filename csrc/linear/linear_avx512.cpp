#define MPLUG2_ISA avx512
#include "linear/linear_rows.h"
