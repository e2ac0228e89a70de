// Common parts of patchify_3d and unpatchify_3d for CPU and CUDA: the geometry, the checks, the dtypes.
//
// A video is [batch, channels, T, Y, X], or [batch, T, Y, X, channels] with channels_last. It is cut into patches of
// t x p x q (frames, rows, columns); a patch is a row of numbers in the order channel, t, p, q, as in the weight of a
// Conv3d. A grid that extends beyond the video has zeros there. Causal: the first patch in time ends with frame 0;
// before it are copies of frame 0 (replicated) or zeros.
#pragma once

// Included after the number types (dispatch.h).
#include "dispatch.h"

namespace megamm {

// Numbers of a normalisation: one for all channels, or one each. GPU kernels take them as arguments, hence the limit.
constexpr int64_t kMaxChannels = 128;

struct Extent {
  int64_t t, y, x;  // frames, rows, columns
};

struct Patching {
  int64_t batch, channels;
  Extent size, patch, grid;
  int64_t front;  // frames of the first patch before frame 0
  bool replicated, channels_last;

  int64_t width() const { return channels * patch.t * patch.y * patch.x; }  // numbers of a patch

  std::vector<int64_t> video_sizes() const {
    if (channels_last) return {batch, size.t, size.y, size.x, channels};
    return {batch, channels, size.t, size.y, size.x};
  }
};

// Elements between neighbours in a video.
struct VideoStrides {
  int64_t batch, channel, frame, row, column;
};

inline int64_t patch_elements(const std::vector<int64_t>& patch, const char* op) {
  STD_TORCH_CHECK(patch.size() == 3 && patch[0] > 0 && patch[1] > 0 && patch[2] > 0, op,
                  ": patch must be three positive numbers");
  return patch[0] * patch[1] * patch[2];
}

inline Patching patching(int64_t batch, int64_t channels, const Extent& size, const std::vector<int64_t>& patch,
                         bool channels_last, bool causal, bool replicated) {
  const auto parts = [](int64_t length, int64_t part) { return (length + part - 1) / part; };
  const int64_t front = causal && size.t > 0 ? patch[0] - 1 : 0;
  const Extent grid{parts(size.t + front, patch[0]), parts(size.y, patch[1]), parts(size.x, patch[2])};
  return {batch, channels, size, {patch[0], patch[1], patch[2]}, grid, front, replicated, channels_last};
}

inline Patching patching_of_video(const Tensor& video, const std::vector<int64_t>& patch, bool channels_last,
                                  bool causal, bool replicated) {
  STD_TORCH_CHECK(video.dim() == 5, "patchify_3d: video must have five axes");
  patch_elements(patch, "patchify_3d");
  const int axis = channels_last ? 1 : 2;
  return patching(video.size(0), video.size(channels_last ? 4 : 1),
                  {video.size(axis), video.size(axis + 1), video.size(axis + 2)}, patch, channels_last, causal,
                  replicated);
}

inline Patching patching_of_patches(const Tensor& patches, const std::vector<int64_t>& patch,
                                    const std::vector<int64_t>& size, bool channels_last, bool causal,
                                    bool replicated) {
  const int64_t elements = patch_elements(patch, "unpatchify_3d");
  STD_TORCH_CHECK(patches.dim() == 5 && patches.size(4) % elements == 0,
                  "unpatchify_3d: patches must be [B, T', Y', X', C * t * p * q]");
  STD_TORCH_CHECK(size.size() == 3 && size[0] >= 0 && size[1] >= 0 && size[2] >= 0,
                  "unpatchify_3d: size must be three numbers of 0 or more");
  const Patching g = patching(patches.size(0), patches.size(4) / elements, {size[0], size[1], size[2]}, patch,
                              channels_last, causal, replicated);
  STD_TORCH_CHECK(g.grid.t == patches.size(1) && g.grid.y == patches.size(2) && g.grid.x == patches.size(3),
                  "unpatchify_3d: the grid of patches does not fit size");
  return g;
}

inline void check_normalisation(const Patching& g, const std::vector<double>& scale, const std::vector<double>& shift) {
  const int64_t count = int64_t(scale.size());
  STD_TORCH_CHECK(scale.size() == shift.size() && (count == 1 || (count == g.channels && count <= kMaxChannels)),
                  "patches: scale and shift must have one number for all channels, or one each of at most 128");
}

inline VideoStrides video_strides(const Tensor& video, bool channels_last) {
  if (channels_last) return {video.stride(0), video.stride(4), video.stride(1), video.stride(2), video.stride(3)};
  return {video.stride(0), video.stride(1), video.stride(2), video.stride(3), video.stride(4)};
}

// Calls f with zeros of the C++ types of the video and of the patches: the same type, or a video in float32 or, if it
// is only read, in uint8.
template <bool kBytes, class F>
void dispatch_video(ScalarType video, ScalarType patches, const char* op, const F& f) {
  dispatch(patches, op, [&](auto zero) {
    if (video == patches) return f(zero, zero);
    if (video == ScalarType::Float) return f(float(0), zero);
    if constexpr (kBytes) {
      if (video == ScalarType::Byte) return f(uint8_t(0), zero);
    }
    STD_TORCH_CHECK(false, op, ": the video's dtype must be that of the patches, float32",
                    kBytes ? " or uint8" : "");
  });
}

}  // namespace megamm
