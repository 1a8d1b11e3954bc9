#define MPLUG2_ISA avx2
#include "linear/linear_rows.h"
