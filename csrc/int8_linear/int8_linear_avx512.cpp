#define MPLUG2_ISA avx512
#include "int8_linear/int8_linear_rows.h"
