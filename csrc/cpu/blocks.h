// Sixty-four inputs of a row at a time, in registers. Each of the two headers defines:
//
//   Blocks<Pattern, Values> blocks(weight, row, k, slot, ahead)
//                                                          slot: of the first stored entry at or after input k;
//                                                          `ahead`: how many inputs further on to prefetch from
//   held = blocks.next<kStrided>(weight, grid, second)     the next 64 inputs, packed; `grid` and `second` are those of
//                                                          their halves
//   Blocks::lanes(weight, held, grid, i)                   values of inputs W i .. W i + W - 1 of them
//   Blocks::codes(weight, held, pruned, out)               their codes, one a byte; `pruned` where there is no entry
//   Blocks::reorder(x)                                     64 floats, so that strided(.., i) meets lanes W i and on:
//   Blocks::strided(weight, held, steps, i)                  W of the values, not neighbours, which takes fewer steps;
//                                                            after next<true>
//   Blocks::Steps(grid)                                    what strided() needs to know of a grid
//   Blocks::kScaled                                        whether strided() leaves out the scale: code - zero
#pragma once

#if defined(__AVX512F__)
#include "blocks_avx512.h"
#else
#include "blocks_eight.h"
#endif
