// Patches of a video on a CPU: patchify_3d normalises, gathers and casts in one pass, unpatchify_3d is its inverse.
//
// Parallel over lines of the patch grid (all patches at one position in batch, time, rows). A vectorised loop converts
// an image row, to or from a buffer in the L1 cache; its pieces of q numbers are copied to or from patches.
#include "simd.h"
// Included after the number types.
#include "../patch_embed.h"

namespace megamm {
namespace {

int64_t lines_of(const Patching& g) { return g.batch * g.grid.t * g.grid.y; }

// Start of a line of the grid.
struct Line {
  int64_t batch, frame, y;
};

MEGAMM_INLINE Line line_at(const Patching& g, int64_t line) {
  const int64_t in_time = line / g.grid.y;
  return {in_time / g.grid.t, in_time % g.grid.t * g.patch.t - g.front, line % g.grid.y * g.patch.y};
}

MEGAMM_INLINE int64_t row_at(const VideoStrides& s, int64_t batch, int64_t channel, int64_t frame, int64_t y) {
  return batch * s.batch + channel * s.channel + frame * s.frame + y * s.row;
}

template <class In, class Out, class C>
MEGAMM_INLINE void convert(const In* from, int64_t from_step, Out* to, int64_t to_step, int64_t count, C scale,
                           C shift) {
  if (from_step == 1 && to_step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(to[i], C(load(from[i])) * scale + shift);
  } else if (from_step == 3 && to_step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(to[i], C(load(from[3 * i])) * scale + shift);
  } else {
    for (int64_t i = 0; i < count; ++i) store(to[to_step * i], C(load(from[from_step * i])) * scale + shift);
  }
}

// Copies pieces of q numbers between an image row [count * q] and one row each of `count` patches. kQ: q if the
// compiler knows it, so that pieces cost no calls.
template <bool kToPatches, int kQ = 0, class T>
MEGAMM_INLINE void move_pieces(T* patches, int64_t patch_stride, T* row, int64_t count, int64_t q) {
  if constexpr (kQ == 0) {
    if (q == 8) return move_pieces<kToPatches, 8>(patches, patch_stride, row, count, q);
    if (q == 14) return move_pieces<kToPatches, 14>(patches, patch_stride, row, count, q);
    if (q == 16) return move_pieces<kToPatches, 16>(patches, patch_stride, row, count, q);
  }
  const int64_t piece = kQ > 0 ? kQ : q;
  for (int64_t i = 0; i < count; ++i) {
    T* in_patch = patches + i * patch_stride;
    T* in_row = row + i * piece;
    std::memcpy(kToPatches ? in_patch : in_row, kToPatches ? in_row : in_patch, size_t(piece) * sizeof(T));
  }
}

// `row` has room for the grid.x * patch.x numbers of a row, zeros from size.x on.
template <class In, class Out>
MEGAMM_CLONES void patchify_lines(const Patching& g, const In* video, const VideoStrides& strides,
                                  const double* scale, const double* shift, bool per_channel, Out* patches, Out* row,
                                  int64_t begin, int64_t end) {
  using C = compute_t<Out>;
  const int64_t t = g.patch.t, p = g.patch.y, q = g.patch.x;
  const int64_t width = g.width();
  for (int64_t line = begin; line < end; ++line) {
    const Line at = line_at(g, line);
    Out* to = patches + line * g.grid.x * width;
    for (int64_t index = 0; index < g.channels * t; ++index) {
      const int64_t c = index / t, number = per_channel ? c : 0;
      int64_t frame = at.frame + index % t;
      if (frame < 0 && g.replicated) frame = 0;
      const bool is_there = frame >= 0 && frame < g.size.t;
      for (int64_t y = at.y; y < at.y + p; ++y, to += q) {
        if (is_there && y < g.size.y) {
          const In* from = video + row_at(strides, at.batch, c, frame, y);
          convert(from, strides.column, row, 1, g.size.x, C(scale[number]), C(shift[number]));
          move_pieces<true>(to, width, row, g.grid.x, q);
        } else {
          for (int64_t i = 0; i < g.grid.x; ++i) std::memset(to + i * width, 0, size_t(q) * sizeof(Out));
        }
      }
    }
  }
}

// `row` and `sums` have room for the grid.x * patch.x numbers of a row.
template <class In, class Out>
MEGAMM_CLONES void unpatchify_lines(const Patching& g, const In* patches, int64_t patch_stride, const double* scale,
                                    bool per_channel, Out* video, const VideoStrides& strides, In* row,
                                    compute_t<In>* sums, int64_t begin, int64_t end) {
  using C = compute_t<In>;
  const int64_t t = g.patch.t, p = g.patch.y, q = g.patch.x;
  const bool is_whole = strides.column == 1 && g.size.x == g.grid.x * q;  // rows of the video consist of whole pieces
  for (int64_t line = begin; line < end; ++line) {
    const Line at = line_at(g, line);
    // Only read; move_pieces writes to patches in its other direction.
    In* from = const_cast<In*>(patches) + line * g.grid.x * patch_stride;
    const int64_t rows = std::min(p, g.size.y - at.y);
    for (int64_t index = 0; index < g.channels * t * rows; ++index) {
      const int64_t c = index / (t * rows), dt = index / rows % t, dy = index % rows, frame = at.frame + dt;
      if (frame < 0 || frame >= g.size.t) continue;
      Out* to = video + row_at(strides, at.batch, c, frame, at.y + dy);
      In* pieces = from + ((c * t + dt) * p + dy) * q;
      const C factor = C(scale[per_channel ? c : 0]);
      const bool is_sum = g.replicated && frame == 0 && dt > 0;  // frame 0 also replaced those before it
      if constexpr (std::is_same_v<In, Out>) {
        if (is_whole && !is_sum && factor == 1) {
          move_pieces<false>(pieces, patch_stride, to, g.grid.x, q);
          continue;
        }
      }
      move_pieces<false>(pieces, patch_stride, row, g.grid.x, q);
      if (!is_sum) {
        convert(row, 1, to, strides.column, g.size.x, factor, C(-0.0));
        continue;
      }
      convert(row, 1, sums, 1, g.size.x, C(1), C(-0.0));
      for (int64_t before = 1; before <= dt; ++before) {
        move_pieces<false>(pieces - before * p * q, patch_stride, row, g.grid.x, q);
#pragma omp simd
        for (int64_t i = 0; i < g.size.x; ++i) sums[i] += load(row[i]);
      }
      convert(sums, 1, to, strides.column, g.size.x, factor, C(-0.0));
    }
  }
}

Tensor patchify_3d(const Tensor& video, std::vector<int64_t> patch, std::vector<double> scale,
                   std::vector<double> shift, bool channels_last, bool causal, bool replicated, ScalarType dtype) {
  const Patching g = patching_of_video(video, patch, channels_last, causal, replicated);
  check_normalisation(g, scale, shift);
  Tensor patches = new_empty(video, {g.batch, g.grid.t, g.grid.y, g.grid.x, g.width()}, dtype);
  dispatch_video<true>(video.scalar_type(), dtype, "patchify_3d", [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    const auto run = [&](int64_t begin, int64_t end) {
      std::vector<Out> row(size_t(g.grid.x * g.patch.x), Out{});
      patchify_lines<In, Out>(g, data_of<In>(video), video_strides(video, channels_last), scale.data(), shift.data(),
                              scale.size() > 1, mutable_data_of<Out>(patches), row.data(), begin, end);
    };
    torch::stable::parallel_for(0, lines_of(g), grain(g.grid.x * g.width()), run);
  });
  return patches;
}

Tensor unpatchify_3d(const Tensor& patches_any, std::vector<int64_t> patch, std::vector<int64_t> size,
                     std::vector<double> scale, bool channels_last, bool causal, bool replicated, ScalarType dtype) {
  const Patching g = patching_of_patches(patches_any, patch, size, channels_last, causal, replicated);
  check_normalisation(g, scale, scale);
  const Tensor patches = as_rows(patches_any);
  Tensor video = new_empty(patches, g.video_sizes(), dtype);
  dispatch_video<false>(dtype, patches.scalar_type(), "unpatchify_3d", [&](auto out, auto in) {
    using In = decltype(in);
    using Out = decltype(out);
    const auto run = [&](int64_t begin, int64_t end) {
      std::vector<In> row(size_t(g.grid.x * g.patch.x));
      std::vector<compute_t<In>> sums(row.size());
      unpatchify_lines<In, Out>(g, data_of<In>(patches), row_stride(patches), scale.data(), scale.size() > 1,
                                mutable_data_of<Out>(video), video_strides(video, channels_last), row.data(),
                                sums.data(), begin, end);
    };
    torch::stable::parallel_for(0, lines_of(g), grain(g.grid.x * g.width()), run);
  });
  return video;
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, CPU, m) {
  m.impl("patchify_3d", TORCH_BOX(&patchify_3d));
  m.impl("unpatchify_3d", TORCH_BOX(&unpatchify_3d));
}

}  // namespace megamm
