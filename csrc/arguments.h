// The C interface's one struct, which fusedlora/cuda.py packs; every member has eight bytes.
#pragma once
#include <stdint.h>

// Null: not there, or not wanted. Outputs start at multiples of 16 bytes. Pitches: elements from a row to the next. terms:
// 1, or 3 where the adapters, fp32, and S keep their precision (see skinny.cuh); s and saved_s are fp32 then. has_seed: 0,
// 1, or 2 where `seed` is the address of the seed. A forward without y gives S alone. With dm, DoRA's gradient, a backward's
// w and b have the gain on their rows; it reads y, gain, norm and bias.
typedef struct {
  int64_t is_bf16, param_is_float, bias_is_float, dm_is_float, terms;
  int64_t block_n, group, programs, shrink_clusters, slices, in_tiles, parts_a, parts_b, db_with_t, first_job;
  int64_t decode_rows, decode_split, decode_early;  // of the decode kernel; zero: the tile kernel
  int64_t M, N, K, r;
  int64_t x_pitch, dy_pitch, w_pitch, a_pitch, b_pitch;
  const void *x, *dy, *w, *a, *b, *bias, *gain, *norm, *s;
  void *y, *saved_s, *dx, *da, *db, *dm;
  void *workspace, *words, *stream;
  double scaling, least;
  int64_t has_seed, seed, bound;
} Arguments;
