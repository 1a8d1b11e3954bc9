#define MPLUG2_ISA avx2
#include "add_layer_norm/add_layer_norm_rows.h"
