#define MPLUG2_ISA avx512
#include "add_layer_norm/add_layer_norm_rows.h"
