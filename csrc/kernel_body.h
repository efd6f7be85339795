// The one algorithm. An ISA file defines `Vec` (its registers) in an anonymous namespace, includes
// this file and exports make_kernels(). Nothing here may come from std:: (a weak symbol compiled
// with this file's flags could be picked by the linker for everybody).
//
// For each panel of 32 outputs, for each K block, for each chain of its units, for each tile of
// rows: acc = x_chain * w_chain in registers, then c += acc, the first chain starting from the
// bias. A result is therefore one fixed series of operations, whatever the tile's shape, the batch
// or the thread.
#include "kernel_epilogue.h"
#include "kernels.h"

namespace finegates {
namespace {

constexpr int kUnitBytes = kPanel * 4;  // one unit of a panel
// How far ahead of its use a weight of a single panel is asked for, bytes: about 900 cycles.
constexpr int ahead_of(int rows) { return rows <= 9 ? 16384 : 8192; }

struct TileArgs {
  const uint8_t* a;
  const uint8_t* w;
  size_t panel_bytes;
  int64_t units;
  int64_t stream_units;  // from w to where the stream of weights jumps
  int64_t jump;          // bytes
  uintptr_t next;        // weights to bring into L2 meanwhile, where several tiles share
  int64_t next_step;     // bytes a unit
  float* c;
  int64_t c_stride;
  const float* addend;  // c itself, or the bias with stride 0 in the first chain
  int64_t addend_stride;
};

// V is Vec, as a parameter so that levels without a dot product need not have one.
template <Kind K, class V>
FG_INLINE F accumulate(F w, F x, F acc) {
  if constexpr (is_dot(K)) {
    return V::dot(w, x, acc);
  } else {
    return V::fma(w, x, acc);
  }
}

template <Kind K, class V>
FG_INLINE F widen_i8(F w, int part) {
  if constexpr (is_dot(K)) {
    return V::i8_pairs(w, part);
  } else {
    return V::i8_floats(w, part);
  }
}

// What is asked for ahead may lie outside the buffer, where a pointer must not lead.
FG_INLINE uintptr_t address(const uint8_t* at) { return reinterpret_cast<uintptr_t>(at); }

template <int kLocality>
FG_INLINE void prefetch(uintptr_t at) {
  __builtin_prefetch(reinterpret_cast<const void*>(at), 0, kLocality);
}

template <Kind K, int MR, int NP, int NV, Ahead kLines>
FG_INLINE void tile_step(F (&acc)[MR][NP * NV], const uint8_t* a, const uint8_t* w,
                         size_t panel_bytes, int64_t ahead) {
  constexpr int kN = NP * NV;
  F wv[kN];
#pragma GCC unroll 8
  for (int j = 0; j < kN; ++j) {
    const uint8_t* at = w + j / NV * panel_bytes + j % NV * (Vec::kLanes * 4);
    wv[j] = Vec::load(reinterpret_cast<const float*>(at));
    if (kLines == Ahead::kEveryLine && j % NV * (Vec::kLanes * 4) % 64 == 0) {
      prefetch<3>(address(at) + (NP > 1 ? ahead : ahead_of(MR)));
    }
  }
  if constexpr (K == Kind::kWide) {
    F odd[kN];
#pragma GCC unroll 8
    for (int j = 0; j < kN; ++j) {
      odd[j] = Vec::high_half(wv[j]);
      wv[j] = Vec::low_half(wv[j]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const float* pair = reinterpret_cast<const float*>(a + r * row_stride(K));
      const F even_x = Vec::broadcast(pair), odd_x = Vec::broadcast(pair + 1);
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) acc[r][j] = Vec::fma(wv[j], even_x, acc[r][j]);
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) acc[r][j] = Vec::fma(odd[j], odd_x, acc[r][j]);
    }
  } else if constexpr (K == Kind::kI8 || K == Kind::kI8Dot) {
    // Four FMAs or two dot products of the widened weight, each with its own unit of x.
    constexpr int kParts = operand_units(K);
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      F wide[kN];
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) wide[j] = widen_i8<K, Vec>(wv[j], part);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const F x = Vec::broadcast(reinterpret_cast<const float*>(a + r * row_stride(K)) + part);
#pragma GCC unroll 8
        for (int j = 0; j < kN; ++j) acc[r][j] = accumulate<K, Vec>(wide[j], x, acc[r][j]);
      }
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const F x = Vec::broadcast(reinterpret_cast<const float*>(a + r * row_stride(K)));
#pragma GCC unroll 8
      for (int j = 0; j < kN; ++j) acc[r][j] = accumulate<K, Vec>(wv[j], x, acc[r][j]);
    }
  }
}

// One tile: MR rows by NP panels, NV vectors of each. It asks for every line of its weights ahead,
// into L1, or for one in eight of several panels, into L2; and it may bring a share of `next` into
// L2.
template <Kind K, int MR, int NP, int NV, Ahead kLines, int kAhead, bool kNext>
void tile(const TileArgs& t) {
  constexpr int kStep = row_stride(K) / kUnits;
  constexpr int kPasses = kPanelVecs / NV;  // over each line of `next`
  F acc[MR][NP * NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < NP * NV; ++j) acc[r][j] = Vec::zero();
  }
  const uint8_t* a = t.a;
  const uint8_t* w = t.w;
  uintptr_t next = t.next;
  // Panels that stream at once look ahead to where each of them goes on: what follows in memory is
  // its neighbour.
  int64_t ahead = kAhead;
  int64_t rest = 0;
  if constexpr (NP > 1) {
    const int64_t far = t.stream_units - ahead / kUnitBytes;
    rest = far < 0 ? t.units : far < t.units ? t.units - far : 0;
  }
  int64_t left = t.units - rest;
  for (;;) {
    for (; left >= 4; left -= 4) {
      if constexpr (kLines == Ahead::kOneInEight) {
#pragma GCC unroll 4
        for (int p = 0; p < NP; ++p) prefetch<2>(address(w + p * t.panel_bytes) + ahead);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        tile_step<K, MR, NP, NV, kLines>(acc, a + i * kStep, w + i * kUnitBytes, t.panel_bytes,
                                         ahead);
        if (kNext && i % kPasses == 0) prefetch<2>(next + i * t.next_step);
      }
      next += 4 * t.next_step;
      a += 4 * kStep;
      w += 4 * kUnitBytes;
    }
    for (; left > 0; --left) {
      tile_step<K, MR, NP, NV, kLines>(acc, a, w, t.panel_bytes, ahead);
      a += kStep;
      w += kUnitBytes;
    }
    if (NP == 1 || rest == 0) break;
    left = rest;
    rest = 0;
    ahead += t.jump;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < NP * NV; ++j) {
      const int64_t at = j / NV * kPanel + j % NV * Vec::kLanes;
      Vec::store(t.c + r * t.c_stride + at,
                 Vec::add(acc[r][j], Vec::load(t.addend + r * t.addend_stride + at)));
    }
  }
}

using TileFunction = void (*)(const TileArgs&);

// The shapes that serve a given number of rows.
struct Shapes {
  int vecs;             // vectors of a panel in a `single` tile
  TileFunction single;  // `vecs` vectors of one panel
  TileFunction shared;  // the same, one of several tiles of rows
  TileFunction narrow;  // one vector of one panel, for the end of the last panel
  struct Grouped {
    int panels;
    TileFunction tile;  // of all `panels`, if more than one
  } grouped[kTunes];
};

template <Kind K, int MR, Tune kTune>
constexpr Shapes::Grouped grouped() {
  constexpr Group kGroup = Vec::group(K, MR, kTune);
  if constexpr (kGroup.panels == 1) {
    return {1, nullptr};
  } else {
    return {kGroup.panels,
            tile<K, MR, kGroup.panels, kPanelVecs, kGroup.lines, kGroup.ahead, false>};
  }
}

// A tile that takes a part of a panel and shares it finds its lines in L1, because its chain is
// short, or in L2, and asks for none.
template <Kind K, int MR>
constexpr Shapes shapes() {
  constexpr int kVecs = Vec::vecs(MR);
  constexpr Ahead kShared = kVecs == kPanelVecs ? Ahead::kEveryLine : Ahead::kNothing;
  constexpr int kAhead = ahead_of(MR);
  return {kVecs,
          tile<K, MR, 1, kVecs, Ahead::kEveryLine, kAhead, false>,
          tile<K, MR, 1, kVecs, kShared, kAhead, true>,
          tile<K, MR, 1, 1, Ahead::kEveryLine, kAhead, false>,
          {grouped<K, MR, Tune::kZen4>(), grouped<K, MR, Tune::kZen5>()}};
}

template <Kind K>
const Shapes& shapes_of(int64_t rows) {
  static constexpr Shapes kTable[] = {
      shapes<K, 1>(),
      shapes<K, Vec::tile_rows(K) >= 2 ? 2 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 3 ? 3 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 4 ? 4 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 5 ? 5 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 6 ? 6 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 7 ? 7 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 8 ? 8 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 9 ? 9 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 10 ? 10 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 11 ? 11 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 12 ? 12 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 13 ? 13 : 1>(),
      shapes<K, Vec::tile_rows(K) >= 14 ? 14 : 1>(),
  };
  return kTable[rows - 1];
}

// `vecs` vectors of one panel.
FG_INLINE void run_tile(const Shapes& shape, TileArgs& args, int vecs, bool alone) {
  const TileFunction whole_tile = alone ? shape.single : shape.shared;
  for (int v = 0; v < vecs;) {
    const bool whole = v + shape.vecs <= vecs;
    (whole ? whole_tile : shape.narrow)(args);
    const int done = whole ? shape.vecs : 1;
    args.w += done * Vec::kLanes * 4;
    args.c += done * Vec::kLanes;
    args.addend += done * Vec::kLanes;
    args.next += args.units * args.next_step;
    v += done;
  }
}

// What the sums of int8 weights start from: bias comes after the scale.
alignas(64) constexpr float kZeros[kPanel * kMaxGroup] = {};

template <Kind K>
void multiply(const Call& call, int64_t first_row, int64_t rows, int64_t first_panel,
              int64_t last_panel, const uint8_t* a, float* c) {
  const Packed& p = call.layer;
  const int unit = unit_length(p.type);
  const int64_t all_units = (p.columns + unit - 1) / unit;
  const int64_t block_units = p.block_columns / unit;
  const int64_t tiles = (rows + Vec::tile_rows(K) - 1) / Vec::tile_rows(K);
  const int64_t limit = p.row_segments[last_panel].start;
  const int64_t up_offset = result_floats(rows);
  // Passes of a tile over its weights, and what each brings of the next ones for each unit.
  const int64_t passes = kPanelVecs / shapes_of<K>(divide_up(rows, tiles)).vecs;
  const int64_t next_step = divide_up(kUnitBytes, tiles * passes);
  for (int64_t panel = first_panel; panel < last_panel;) {
    // Panels that share a K block of gathered rows while it is in L2, and, where a single tile
    // holds all rows, panels multiplied at once.
    int64_t span = 1, group = 1;
    const Shapes::Grouped* together = nullptr;
    if (tiles == 1) {
      together = &shapes_of<K>(rows).grouped[static_cast<int>(call.tune)];
      group = panel + together->panels > last_panel ? 1 : together->panels;
      span = group;
    } else if (p.column_blocks > 1) {
      span = last_panel - panel < kMaxSpan ? last_panel - panel : kMaxSpan;
    }
    const int64_t c_stride = span * kPanel;
    // Both layers of a gated pair one after the other: each is one stream.
    for (int half = 0; half <= (call.pair ? 1 : 0); ++half) {
      const Packed& weights = half == 0 ? p : call.up;
      const bool last_half = half == 1 || !call.pair;
      float* const half_c = c + half * up_offset;
      const uintptr_t from = address(weights.panels) + panel * p.panel_bytes;
      const uintptr_t after = last_half ? address(p.panels) + (panel + span) * p.panel_bytes
                                        : address(call.up.panels) + panel * p.panel_bytes;
      for (int64_t block = 0; block < p.column_blocks; ++block) {
        const int64_t first_unit = block * block_units;
        const int64_t end_unit =
            first_unit + block_units < all_units ? first_unit + block_units : all_units;
        const bool last_block = block + 1 == p.column_blocks;
        for (int64_t q = 0; q < span; q += group) {
          // Narrower tiles at the very end of the outputs.
          const int64_t outputs = p.rows - (panel + q) * kPanel;
          const int vecs = group > 1 || outputs >= kPanel
                               ? kPanelVecs
                               : static_cast<int>((outputs + Vec::kLanes - 1) / Vec::kLanes);
          const uintptr_t next_q = q + group < span
                                       ? from + (q + 1) * p.panel_bytes + first_unit * kUnitBytes
                                   : last_block ? after
                                                : from + end_unit * kUnitBytes;
          const int64_t chains = divide_up(end_unit - first_unit, Vec::chain(K));
          const int64_t chain = chains > 1 ? divide_up(end_unit - first_unit, chains) : block_units;
          // At least once, also without columns: the bias still has to arrive.
          for (int64_t unit = first_unit; unit == first_unit || unit < end_unit; unit += chain) {
            const int64_t units = end_unit - unit < chain ? end_unit - unit : chain;
            const bool last_chain = unit + units >= end_unit;
            // What comes after this chain: every tile brings its part, so that memory is read
            // throughout, not only under the first one.
            const uintptr_t next =
                last_chain ? next_q : from + q * p.panel_bytes + (unit + units) * kUnitBytes;
            int64_t tile_row = 0;
            for (int64_t t = 0; t < tiles; ++t) {
              const int64_t tile_rows = (rows - tile_row) / (tiles - t);
              const Shapes& shape = shapes_of<K>(tile_rows);
              float* const tile_c = half_c + tile_row * c_stride + q * kPanel;
              TileArgs args;
              args.a = a + block * block_bytes(K, rows) + tile_row * row_stride(K) +
                       (unit - first_unit) * (row_stride(K) / kUnits);
              args.w = weights.panels + (panel + q) * p.panel_bytes + unit * kUnitBytes;
              args.panel_bytes = p.panel_bytes;
              args.units = units;
              args.stream_units = all_units - unit;
              args.jump = static_cast<int64_t>(after - from - p.panel_bytes);
              args.next = next + t * passes * units * next_step;
              args.next_step = next_step;
              args.c = tile_c;
              args.c_stride = c_stride;
              const float* first = p.scale ? kZeros : weights.bias + (panel + q) * kPanel;
              args.addend = unit == 0 ? first : tile_c;
              args.addend_stride = unit == 0 ? 0 : c_stride;
              if (group > 1) {
                together->tile(args);
              } else {
                run_tile(shape, args, vecs, tiles == 1);
              }
              if (last_half && last_chain && last_block) {
                float* const gate_c = c + tile_row * c_stride + q * kPanel;
                for (int64_t g = 0; g < group; ++g) {
                  finish(call, first_row + tile_row, tile_rows, panel + q + g, limit,
                         gate_c + g * kPanel, c_stride, gate_c + g * kPanel + up_offset);
                }
              }
              tile_row += tile_rows;
            }
          }
        }
      }
    }
    panel += span;
  }
}

void multiply_any(const Call& call, int64_t first_row, int64_t rows, int64_t first_panel,
                  int64_t last_panel, const uint8_t* a, float* c) {
  switch (call.kind) {
    case Kind::kF32:
      return multiply<Kind::kF32>(call, first_row, rows, first_panel, last_panel, a, c);
    case Kind::kWide:
      return multiply<Kind::kWide>(call, first_row, rows, first_panel, last_panel, a, c);
    case Kind::kDot:
      if constexpr (Vec::kHasDot) {
        return multiply<Kind::kDot>(call, first_row, rows, first_panel, last_panel, a, c);
      }
      return;
    case Kind::kI8:
      return multiply<Kind::kI8>(call, first_row, rows, first_panel, last_panel, a, c);
    case Kind::kI8Dot:
      if constexpr (Vec::kHasDot) {
        return multiply<Kind::kI8Dot>(call, first_row, rows, first_panel, last_panel, a, c);
      }
  }
}

// Out: fp32 operand (from fp32 or bf16 x) or bf16 operand (from bf16 x). Row by row, so that x
// is read as one stream.
template <class In, class Out>
void gather(const Call& call, int64_t first_row, int64_t rows, uint8_t* a) {
  const Packed& p = call.layer;
  const int stride = row_stride(call.kind);
  for (int64_t r = 0; r < rows; ++r) {
    const In* in = reinterpret_cast<const In*>(call.x + (first_row + r) * call.x_stride);
    for (int64_t block = 0; block < p.column_blocks; ++block) {
      const Segment& segment = p.column_segments[block];
      const Segment& next = p.column_segments[block + 1];
      Out* out = reinterpret_cast<Out*>(a + block * block_bytes(call.kind, rows) + r * stride);
      out = Vec::gather(out, in + segment.start, p.column_masks + segment.chunk,
                        next.start - segment.start);
      // What a last incomplete unit lacks; its weights are zero, but zero times NaN is not.
      for (int i = 1; i < unit_length(p.type); ++i) *out++ = 0;
    }
  }
}

void gather_any(const Call& call, int64_t first_row, int64_t rows, uint8_t* a) {
  if (call.type == Type::kF32) return gather<float, float>(call, first_row, rows, a);
  if (!is_dot(call.kind)) return gather<uint16_t, float>(call, first_row, rows, a);
  if constexpr (Vec::kHasDot) gather<uint16_t, uint16_t>(call, first_row, rows, a);
}

}  // namespace
}  // namespace finegates

#include "kernel_attention.h"
#include "kernel_encoder.h"

namespace finegates {
namespace {

constexpr Kernels make_kernels(const char* name) {
  return {name,
          Vec::kHasDot,
          Vec::kLanes,
          {Vec::tile_rows(Kind::kF32), Vec::tile_rows(Kind::kWide), Vec::tile_rows(Kind::kDot),
           Vec::tile_rows(Kind::kI8), Vec::tile_rows(Kind::kI8Dot)},
          gather_any,
          multiply_any,
          self_attention_any,
          layer_norm_any,
          rms_norm_any,
          append_any,
          attend_any};
}

}  // namespace
}  // namespace finegates
