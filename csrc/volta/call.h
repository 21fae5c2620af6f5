// One attention call as the kernels get it: a struct by value. Its Python twin is backends/hetero_attn_volta/abi.py.
//
// Strides count elements and stand in the order batch, head, token, feature. Varlen: sequences lie one after another along the tokens and
// the batch strides are 0. Paged: the batch strides of k and v are those of a page. Null pointers are operands that the call has not.
#pragma once

struct Call {
  const unsigned short *q, *k, *v;         // halves
  unsigned short* out;
  float* lse;                              // natural logarithm
  const void* mask;
  const float *slopes, *sinks;             // slopes by their strides, sinks [q_heads]
  const int *cu_q, *cu_k;                  // [batch + 1]
  const int *table, *lengths;              // pages of a sequence [batch][table_stride], and its length [batch]
  float *partial_out, *partial_rows;       // [splits][q_heads * total_q][partial_dim], [splits][q_heads * total_q][2]; only if splits > 1
  long long q_stride[4], k_stride[4], v_stride[4], out_stride[4], mask_stride[4];
  long long lse_stride[2], slopes_stride[2];            // batch, head
  long long table_stride, total_q;
  int batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim, page_size;
  int left, right;                         // window around a row's own position, inclusive; -1 = unlimited; causal is right = 0
  int mask_kind;                           // MASK_...
  int first_batch;                         // grids are at most 65535 sequences high: longer batches come in parts
  int splits;                              // parts into which every row's keys are cut
  int partial_dim;                         // features of a row of partial_out
  int vector_q, vector_k, vector_v, vector_out;         // rows may be moved 16 bytes at a time (out: 8)
  float scale, softcap;                    // softcap 0 = off
};

enum { MASK_NONE = 0, MASK_BOOL = 1, MASK_HALF = 2, MASK_FLOAT = 3 };
