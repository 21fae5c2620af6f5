// Attention in fp16.
#include "attention.h"

int ha::attend_f16(const HaAttention& a) { return attend<f16>(a); }
