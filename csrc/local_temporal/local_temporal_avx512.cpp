#define MPLUG2_ISA avx512
#include "local_temporal/local_temporal_rows.h"
