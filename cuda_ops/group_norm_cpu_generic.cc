// GroupNorm and ReLU on CPU, compiled for the instruction set in this file's name.

#define TFMTSEG_SET group_norm_generic

#include "group_norm_cpu_rows.h"
