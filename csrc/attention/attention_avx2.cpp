#define MPLUG2_ISA avx2
#include "attention/attention_rows.h"
