// Attention in fp32.
#include "attention.h"

int ha::attend_f32(const HaAttention& a) { return attend<float>(a); }
