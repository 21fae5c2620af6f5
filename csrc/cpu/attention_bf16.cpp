// Attention in bf16.
#include "attention.h"

int ha::attend_bf16(const HaAttention& a) { return attend<bf16>(a); }
