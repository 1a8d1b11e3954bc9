#define MPLUG2_ISA avx2
#include "local_temporal/local_temporal_rows.h"
