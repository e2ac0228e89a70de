// Patches of a video on a GPU: patchify_3d normalises, gathers and casts in one pass, unpatchify_3d is its inverse.
//
// A thread processes kVector neighbouring columns of a patch row, in all channels. Neighbouring threads have
// neighbouring columns, then rows, frames and patches, so that a warp writes runs of 512 bytes, channel by channel.
// kVector is 16 bytes of the patches if both patches and image rows consist of such vectors, otherwise 2 columns (an
// even q) or 1: with narrow threads the reads of a warp stay in few image rows.
// The position of every unit of work follows from its number alone; threads do not wait for each other.
#include "common.cuh"
// Included after the number types.
#include "../patch_embed.h"

namespace megamm {
namespace {

constexpr int kThreads = 256;
constexpr int kTogether = 4;  // channels that a thread has in flight

// Access pattern for the columns of the video.
enum class Columns {
  kRow,    // neighbours, in aligned vectors
  kColour, // three channels side by side, in aligned vectors
  kAny,    // one by one, at any stride and any width
};

// Numbers of a normalisation, one for all channels (last = 0) or one each.
template <class C>
struct Factors {
  C of[kMaxChannels];
  int last;

  explicit Factors(const std::vector<double>& numbers) : of{}, last(int(numbers.size()) - 1) {
    for (size_t i = 0; i < numbers.size(); ++i) of[i] = C(numbers[i]);
  }
};

// Division by a number known to the host: for numerators below 2^31, by a multiplication. Source: Granlund and
// Montgomery 1994, "Division by Invariant Integers using Multiplication".
struct Divider {
  uint32_t factor = 0, shift = 0;
  uint64_t divisor;

  Divider() : Divider(1) {}
  explicit Divider(int64_t by) : divisor(by > 0 ? uint64_t(by) : 1) {
    if (divisor > INT32_MAX) return;  // then no number of fewer than 2^31 units is divided by it
    while ((uint64_t(1) << shift) < divisor) ++shift;
    factor = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1);
  }

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (uint32_t(uint64_t(n) * factor >> 32) + n) >> shift;
  }
  __device__ __forceinline__ uint64_t quotient(uint64_t n) const { return n / divisor; }
};

// Components of a unit's number, the fastest first: vectors of a patch row, rows and frames of a patch, the grid.
struct Dividers {
  Divider dx, dy, dt, x, y, t;
};

template <class Video, class Patches>
struct Job {
  Patching g;
  Video* video;
  VideoStrides strides;
  Patches* patches;
  int64_t patch_stride;
  uint64_t units = 0;
  Dividers by{};  // set together with the units
};

// Position of a unit's numbers: video and patches point at its first column in channel 0.
template <class Video, class Patches>
struct Unit {
  Video* video;
  Patches* patches;
  int64_t columns;   // remaining columns of the video; 0 or less in the padding of its rows and columns
  int64_t frame;     // negative before the video
  int64_t in_patch;  // frame of the patch
};

struct Place {
  int64_t patch, batch, t, y, x, dt, dy, dx;
};

template <class Index>
__device__ __forceinline__ Place place_of(Index n, const Dividers& by) {
  const auto split = [&n](const Divider& by) {
    const Index quotient = by.quotient(n), rest = n - quotient * Index(by.divisor);
    n = quotient;
    return int64_t(rest);
  };
  const int64_t dx = split(by.dx), dy = split(by.dy), dt = split(by.dt), patch = int64_t(n);
  const int64_t x = split(by.x), y = split(by.y), t = split(by.t);
  return {patch, int64_t(n), t, y, x, dt, dy, dx};
}

template <int kVector, class Video, class Patches>
__device__ __forceinline__ Unit<Video, Patches> unit_at(const Job<Video, Patches>& j, uint64_t n) {
  const Place at = j.units <= INT32_MAX ? place_of(uint32_t(n), j.by) : place_of(n, j.by);
  const int64_t dx = at.dx * kVector;
  Patches* const patches =
      j.patches + at.patch * j.patch_stride + (at.dt * j.g.patch.y + at.dy) * j.g.patch.x + dx;
  const int64_t x = at.x * j.g.patch.x + dx, y = at.y * j.g.patch.y + at.dy;
  const int64_t frame = at.t * j.g.patch.t + at.dt - j.g.front;
  const int64_t read = frame < 0 ? 0 : frame;
  const bool is_there = y < j.g.size.y && frame < j.g.size.t;
  Video* const video =
      j.video + at.batch * j.strides.batch + read * j.strides.frame + y * j.strides.row + x * j.strides.column;
  return {video, patches, is_there ? j.g.size.x - x : 0, frame, at.dt};
}

// The numbers of `count` channels from `channel` on. kColour has all of them in the first call.
template <Columns kColumns, int kVector, class V>
__device__ __forceinline__ void read(const V* from, int64_t channel, int64_t channel_stride, int64_t column_stride,
                                     int64_t columns, int64_t count, Vector<V, kVector> (&to)[kTogether]) {
  if constexpr (kColumns == Columns::kColour) {
    Vector<V, kVector> raw[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) raw[k] = reinterpret_cast<const Vector<V, kVector>*>(from)[k];
#pragma unroll
    for (int k = 0; k < 3 * kVector; ++k) to[k % 3].items[k / 3] = raw[k / kVector].items[k % kVector];
  } else {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (k >= count) continue;
      const V* in = from + (channel + k) * channel_stride;
      if constexpr (kColumns == Columns::kRow) {
        to[k] = *reinterpret_cast<const Vector<V, kVector>*>(in);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (i < columns) to[k].items[i] = in[i * column_stride];
      }
    }
  }
}

template <Columns kColumns, int kVector, class V>
__device__ __forceinline__ void write(const Vector<V, kVector> (&from)[kTogether], V* to, int64_t channel,
                                      int64_t channel_stride, int64_t column_stride, int64_t columns, int64_t count) {
  if constexpr (kColumns == Columns::kColour) {
    Vector<V, kVector> raw[3];
#pragma unroll
    for (int k = 0; k < 3 * kVector; ++k) raw[k / kVector].items[k % kVector] = from[k % 3].items[k / 3];
#pragma unroll
    for (int k = 0; k < 3; ++k) reinterpret_cast<Vector<V, kVector>*>(to)[k] = raw[k];
  } else {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (k >= count) continue;
      V* out = to + (channel + k) * channel_stride;
      if constexpr (kColumns == Columns::kRow) {
        *reinterpret_cast<Vector<V, kVector>*>(out) = from[k];
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (i < columns) out[i * column_stride] = from[k].items[i];
      }
    }
  }
}

template <class In, class Out, int kVector, Columns kColumns>
__global__ void __launch_bounds__(kThreads)
    patchify(const Job<const In, Out> j, const Factors<compute_t<Out>> scale, const Factors<compute_t<Out>> shift) {
  using C = compute_t<Out>;
  const uint64_t n = uint64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= j.units) return;
  auto unit = unit_at<kVector>(j, n);
  if (unit.frame < 0 && !j.g.replicated) unit.columns = 0;
  const int64_t in_patch = j.g.patch.t * j.g.patch.y * j.g.patch.x;
  for (int64_t channel = 0; channel < j.g.channels; channel += kTogether) {
    const int64_t count = j.g.channels - channel;
    Vector<In, kVector> in[kTogether];
    if (unit.columns > 0)
      read<kColumns>(unit.video, channel, j.strides.channel, j.strides.column, unit.columns, count, in);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (k >= count) continue;
      const int number = channel + k < scale.last ? int(channel + k) : scale.last;
      Vector<Out, kVector> out;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        // Vectors are either in the video or outside of it, never across its edge.
        const bool is_there = unit.columns > (kColumns == Columns::kAny ? i : 0);
        store(out.items[i], is_there ? C(load(in[k].items[i])) * scale.of[number] + shift.of[number] : C(0));
      }
      *reinterpret_cast<Vector<Out, kVector>*>(unit.patches + (channel + k) * in_patch) = out;
    }
  }
}

template <class In, class Out, int kVector, Columns kColumns>
__global__ void __launch_bounds__(kThreads)
    unpatchify(const Job<Out, const In> j, const Factors<compute_t<In>> scale) {
  using C = compute_t<In>;
  const uint64_t n = uint64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= j.units) return;
  const auto unit = unit_at<kVector>(j, n);
  if (unit.columns <= 0 || unit.frame < 0) return;
  const int64_t in_frame = j.g.patch.y * j.g.patch.x, in_patch = j.g.patch.t * in_frame;
  // Frame 0 also replaced those before it.
  const int64_t before = j.g.replicated && unit.frame == 0 ? unit.in_patch : 0;
  for (int64_t channel = 0; channel < j.g.channels; channel += kTogether) {
    const int64_t count = j.g.channels - channel;
    C sums[kTogether][kVector] = {};
    // Nearly always one frame: unrolled, the loop would only take registers.
#pragma unroll 1
    for (int64_t frame = -before; frame <= 0; ++frame) {
      Vector<In, kVector> in[kTogether];
      read<Columns::kRow>(unit.patches + frame * in_frame, channel, in_patch, 1, unit.columns, count, in);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k >= count) continue;
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          sums[k][i] = frame == -before ? load(in[k].items[i]) : sums[k][i] + load(in[k].items[i]);
      }
    }
    Vector<Out, kVector> out[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (k >= count) continue;
      const int number = channel + k < scale.last ? int(channel + k) : scale.last;
#pragma unroll
      for (int i = 0; i < kVector; ++i) store(out[k].items[i], sums[k][i] * scale.of[number]);
    }
    write<kColumns>(out, unit.video, channel, j.strides.channel, j.strides.column, unit.columns, count);
  }
}

// Whether vectors of `kVector` columns can be moved between patches at this address and a video with these strides.
template <class Video, class Patches>
bool has_vectors(const Job<Video, Patches>& j, int64_t vector, int64_t columns_apart) {
  const auto aligned = [vector](const void* at, size_t bytes) {
    return reinterpret_cast<uintptr_t>(at) % (size_t(vector) * bytes) == 0;
  };
  // In a colour image the stride between channels does not have to be a multiple.
  const int64_t channel_stride = columns_apart == 1 && j.g.channels > 1 ? j.strides.channel : 0;
  return j.g.patch.x % vector == 0 && j.g.size.x % vector == 0 && j.strides.column == columns_apart &&
         (j.strides.batch | channel_stride | j.strides.frame | j.strides.row | j.patch_stride) % vector == 0 &&
         aligned(j.video, sizeof(Video)) && aligned(j.patches, sizeof(Patches));
}

// Calls run(vector width, columns, units) with the first two as constants.
template <class Video, class Patches, class F>
void choose(Job<Video, Patches>& j, const F& run) {
  constexpr int kWide = kPerVector<Patches>;
  const auto with = [&](auto vector, auto columns) {
    const Patching& g = j.g;
    const int64_t vectors = g.patch.x / vector;
    j.by = {Divider(vectors), Divider(g.patch.y), Divider(g.patch.t), Divider(g.grid.x), Divider(g.grid.y),
            Divider(g.grid.t)};
    j.units = uint64_t(g.batch * g.grid.t * g.grid.y * g.grid.x) * uint64_t(g.patch.t * g.patch.y * vectors);
    run(vector, columns, int64_t((j.units + kThreads - 1) / kThreads));
  };
  using std::integral_constant;
  if (has_vectors(j, kWide, 1)) {
    with(integral_constant<int, kWide>{}, integral_constant<Columns, Columns::kRow>{});
  } else if (j.g.channels == 3 && j.strides.channel == 1 && has_vectors(j, kWide, 3)) {
    with(integral_constant<int, kWide>{}, integral_constant<Columns, Columns::kColour>{});
  } else if (j.g.patch.x % 2 == 0 && j.patch_stride % 2 == 0 && reinterpret_cast<uintptr_t>(j.patches) % 16 == 0) {
    with(integral_constant<int, 2>{}, integral_constant<Columns, Columns::kAny>{});
  } else {
    with(integral_constant<int, 1>{}, integral_constant<Columns, Columns::kAny>{});
  }
}

Tensor patchify_3d(const Tensor& video, std::vector<int64_t> patch, std::vector<double> scale,
                   std::vector<double> shift, bool channels_last, bool causal, bool replicated, ScalarType dtype) {
  const Patching g = patching_of_video(video, patch, channels_last, causal, replicated);
  check_normalisation(g, scale, shift);
  DeviceGuard guard(video.get_device_index());
  Tensor patches = new_empty(video, {g.batch, g.grid.t, g.grid.y, g.grid.x, g.width()}, dtype);
  dispatch_video<true>(video.scalar_type(), dtype, "patchify_3d", [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    using C = compute_t<Out>;
    Job<const In, Out> j{g, data_of<In>(video), video_strides(video, channels_last), mutable_data_of<Out>(patches),
                         g.width()};
    choose(j, [&](auto vector, auto columns, int64_t blocks) {
      launch(patchify<In, Out, decltype(vector)::value, decltype(columns)::value>, blocks, kThreads, 0, video, j,
             Factors<C>(scale), Factors<C>(shift));
    });
  });
  return patches;
}

Tensor unpatchify_3d(const Tensor& patches_any, std::vector<int64_t> patch, std::vector<int64_t> size,
                     std::vector<double> scale, bool channels_last, bool causal, bool replicated, ScalarType dtype) {
  const Patching g = patching_of_patches(patches_any, patch, size, channels_last, causal, replicated);
  check_normalisation(g, scale, scale);
  DeviceGuard guard(patches_any.get_device_index());
  const Tensor patches = as_rows(patches_any);
  Tensor video = new_empty(patches, g.video_sizes(), dtype);
  dispatch_video<false>(dtype, patches.scalar_type(), "unpatchify_3d", [&](auto out, auto in) {
    using In = decltype(in);
    using Out = decltype(out);
    Job<Out, const In> j{g, mutable_data_of<Out>(video), video_strides(video, channels_last), data_of<In>(patches),
                         row_stride(patches)};
    choose(j, [&](auto vector, auto columns, int64_t blocks) {
      launch(unpatchify<In, Out, decltype(vector)::value, decltype(columns)::value>, blocks, kThreads, 0, patches, j,
             Factors<compute_t<In>>(scale));
    });
  });
  return video;
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, MEGAMM_CUDA_KEY, m) {
  m.impl("patchify_3d", TORCH_BOX(&patchify_3d));
  m.impl("unpatchify_3d", TORCH_BOX(&unpatchify_3d));
}

}  // namespace megamm
