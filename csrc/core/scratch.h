// Memory that a kernel needs only while it runs, kept between calls by each calling thread: fresh pages cost more to
// fault in than a pass over them takes. Blocks up to kKept bytes are kept, larger ones are given back at once.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mplug2 {

class Scratch {
 public:
  static constexpr size_t kPage = size_t{2} << 20;  // a huge page
  static constexpr size_t kKept = size_t{96} << 20;

  // The block lives until the Scratch does; one Scratch at a time may hold a thread's kept block.
  explicit Scratch(size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    Block& kept = thread_block();
    if (bytes_ > kKept || kept.taken) {
      data_ = allocate(bytes_);
      return;
    }
    if (kept.bytes < bytes_) {
      std::free(kept.data);
      kept.data = nullptr;
      kept.bytes = 0;
      kept.data = allocate(bytes_);
      kept.bytes = bytes_;
    }
    data_ = kept.data;
    kept.taken = from_kept_ = true;
  }
  ~Scratch() {
    if (from_kept_)
      thread_block().taken = false;
    else
      std::free(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  // The next rows x columns elements of the block, as a tensor that does not own them.
  torch::stable::Tensor take(int64_t rows, int64_t columns, torch::headeronly::ScalarType dtype, size_t element_size) {
    char* start = static_cast<char*>(data_) + used_;
    used_ += bytes_of(rows, columns, element_size);
    const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
    return torch::stable::from_blob(start, {sizes, 2}, {strides, 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
  }
  static size_t bytes_of(int64_t rows, int64_t columns, size_t element_size) {
    return (static_cast<size_t>(rows) * columns * element_size + 63) / 64 * 64;
  }

 private:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    bool taken = false;
    ~Block() { std::free(data); }
  };
  static Block& thread_block() {
    static thread_local Block block;
    return block;
  }
  static void* allocate(size_t bytes) {
    void* data = std::aligned_alloc(kPage, bytes);
    if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(data, bytes, MADV_HUGEPAGE);  // a hint: without it the kernel gives small pages
#endif
    return data;
  }

  size_t bytes_;
  size_t used_ = 0;
  void* data_ = nullptr;
  bool from_kept_ = false;
};

}  // namespace mplug2
