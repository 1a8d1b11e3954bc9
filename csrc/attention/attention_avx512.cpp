#define MPLUG2_ISA avx512
#include "attention/attention_rows.h"
