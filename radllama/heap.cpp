// A heap for the tensors of a training process on a CPU: best fit in one growing range, and nothing goes back to the
// system. See heap.py.

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kAlign = 64;                  // what torch's vector code expects
constexpr size_t kSmallest = size_t{1} << 16;  // below: malloc
constexpr size_t kLargest = size_t{1} << 36;   // above: malloc, which refuses what no machine has
constexpr size_t kRange = size_t{1} << 40;     // of addresses; memory is taken where one is written to

class Heap final : public c10::Allocator {
 public:
  bool map() {
    if (!base_) {
      void* range = mmap(nullptr, kRange, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (range != MAP_FAILED) base_ = static_cast<char*>(range);
    }
    return base_;
  }

  size_t most() {
    std::lock_guard<std::mutex> guard(mutex_);
    return most_;
  }

  c10::DataPtr allocate(size_t size) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }

  void* take(size_t size) {
    size = (size + kAlign - 1) / kAlign * kAlign;
    std::lock_guard<std::mutex> guard(mutex_);
    size_t start = top_;
    auto hole = holes_.lower_bound({size, 0});
    if (hole != holes_.end()) {
      auto [width, first] = *hole;
      start = first;
      remove_hole(first, width);
      if (width > size) add_hole(first + size, width - size);
    } else {
      if (size > kRange - top_) return nullptr;
      top_ += size;
      most_ = std::max(most_, top_);
    }
    taken_[start] = size;
    return base_ + start;
  }

  bool give_back(void* block) {
    size_t start = static_cast<char*>(block) - base_;
    if (static_cast<char*>(block) < base_ || start >= kRange) return false;
    std::lock_guard<std::mutex> guard(mutex_);
    auto found = taken_.find(start);
    size_t size = found->second;
    taken_.erase(found);
    auto next = starts_.lower_bound(start);
    if (next != starts_.begin()) {
      auto [before, width] = *std::prev(next);
      if (before + width == start) {
        remove_hole(before, width);
        start = before;
        size += width;
      }
    }
    if (next != starts_.end() && next->first == start + size) {
      size_t width = next->second;
      remove_hole(start + size, width);
      size += width;
    }
    if (start + size == top_) {
      top_ = start;
    } else {
      add_hole(start, size);
    }
    return true;
  }

 private:
  void add_hole(size_t start, size_t size) {
    starts_[start] = size;
    holes_.insert({size, start});
  }

  void remove_hole(size_t start, size_t size) {
    starts_.erase(start);
    holes_.erase({size, start});
  }

  std::mutex mutex_;
  char* base_ = nullptr;
  size_t top_ = 0, most_ = 0;
  std::map<size_t, size_t> starts_;            // holes: start, size
  std::set<std::pair<size_t, size_t>> holes_;  // the same by size, then by start
  std::unordered_map<size_t, size_t> taken_;
};

Heap& heap = *new Heap;  // never destroyed: tensors may outlive everything else of the process

void release(void* block) {
  if (block && !heap.give_back(block)) std::free(block);
}

c10::DeleterFnPtr Heap::raw_deleter() const { return &release; }

c10::DataPtr Heap::allocate(size_t size) {
  void* block = size >= kSmallest && size <= kLargest ? take(size) : nullptr;
  bool failed = !block && size && posix_memalign(&block, kAlign, size);
  TORCH_CHECK(!failed, "not enough memory for ", size, " bytes");
  return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
}

}  // namespace

extern "C" {

// Every tensor allocated from now on comes from the heap. False: this system gives no such range of addresses.
bool install() {
  if (!heap.map()) return false;
  c10::SetCPUAllocator(&heap, 1);
  return true;
}

// The heap's largest extent so far, in bytes.
size_t most() { return heap.most(); }
}
