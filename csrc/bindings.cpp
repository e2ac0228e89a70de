// The schemas of all kernels. Kernels register in cpu/ and cuda/; shapes for tracing (Meta) and gradients
// (Autograd) in megamm/ops, where each op is documented.
#include "common.h"

MEGAMM_SCHEMAS(MEGAMM_LIBRARY, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool zero_centered) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dx_add, Tensor x, Tensor weight, Tensor rstd, bool zero_centered)"
      " -> (Tensor dx, Tensor dweight)");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool zero_centered)"
      " -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def(
      "rope(Tensor query, Tensor key, Tensor position, Tensor frequency, float factor, bool inverse)"
      " -> (Tensor query, Tensor key)");
  m.def("cross_entropy_statistics(Tensor logits, Tensor target, Tensor(a!) statistics) -> ()");
  m.def("cross_entropy_gradient_(Tensor(a!) logits, Tensor target, Tensor statistics, Tensor factor) -> ()");
  m.def(
      "patchify_3d(Tensor video, int[] patch, float[] scale, float[] shift, bool channels_last, bool causal,"
      " bool replicated, ScalarType dtype) -> Tensor");
  m.def(
      "unpatchify_3d(Tensor patches, int[] patch, SymInt[] size, float[] scale, bool channels_last, bool causal,"
      " bool replicated, ScalarType dtype) -> Tensor");
  m.def("swiglu(Tensor gate_up, Tensor? row_weight, float? limit) -> Tensor");
  m.def(
      "swiglu_backward(Tensor dy, Tensor gate_up, Tensor? row_weight, float? limit)"
      " -> (Tensor dgate_up, Tensor drow_weight)");
}
