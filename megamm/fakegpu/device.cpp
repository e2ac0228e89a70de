// A "cuda" device that computes nothing: a device guard, and hooks that report the device.
//
// FakeTensors carry a device but no memory. Autograd's engine and torch.Generator still ask the device's guard for the
// current device and stream. A CPU build has none, and that of a GPU build needs a GPU. Every answer here is "yes, and it
// is finished already". The library is loaded after torch's own and before its Python module, which reads these
// registrations once.
// The number of devices is that of a node, so that a rank's LOCAL_RANK exists.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kDevices = 8;
thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex exchange(c10::DeviceIndex index) {
  const auto previous = current;
  current = index < 0 ? current : index;  // -1 is "the current device"
  return previous;
}

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  static c10::Device device(c10::DeviceIndex index) { return {c10::DeviceType::CUDA, index}; }
  static c10::Stream stream(c10::Device on) { return c10::Stream(c10::Stream::DEFAULT, on); }

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Device getDevice() const override { return device(current); }
  c10::Device exchangeDevice(c10::Device to) const override { return device(exchange(to.index())); }
  void setDevice(c10::Device to) const override { exchange(to.index()); }
  void uncheckedSetDevice(c10::Device to) const noexcept override { exchange(to.index()); }

  // There is one stream, and no work on it is ever pending.
  c10::Stream getStream(c10::Device on) const override { return stream(on); }
  c10::Stream getDefaultStream(c10::Device on) const override { return stream(on); }
  c10::Stream getNewStream(c10::Device on, int) const override { return stream(on); }
  c10::Stream getStreamFromGlobalPool(c10::Device on, bool) const override { return stream(on); }
  c10::Stream exchangeStream(c10::Stream to) const override { return stream(to.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int recorded;
    *event = &recorded;  // an event is created by its first record, and must not be null after it
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

struct FakeHooks : at::CUDAHooksInterface {
  explicit FakeHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { exchange(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchange(index); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  // Nothing is drawn from it: it only has to exist.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)
}
namespace at {
// "CUDAHooks" is the name under which torch looks them up. A GPU build has registered its own: these are preferred.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, FakeHooks)
}
