// An array that grows without moving what it holds, and without room for twice as much.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace prfaas {

using u32 = std::uint32_t;

// `kByte` fills what is not yet written: elements are copied whole, and have to be plain.
template <class T, int kByte>
class Chunks {
 public:
  Chunks() = default;
  Chunks(const Chunks& other) {
    chunks_.reserve(other.chunks_.size());
    for (const auto& chunk : other.chunks_) {
      chunks_.emplace_back(new T[kChunk]);
      std::memcpy(static_cast<void*>(chunks_.back().get()), chunk.get(), kChunk * sizeof(T));
    }
  }
  Chunks& operator=(const Chunks&) = delete;

  T& operator[](u32 index) { return chunks_[index >> kBits][index & (kChunk - 1)]; }
  const T& operator[](u32 index) const { return chunks_[index >> kBits][index & (kChunk - 1)]; }

  bool covers(u32 index) const { return index >> kBits < chunks_.size(); }
  void cover(u32 index) {
    while (!covers(index)) {
      chunks_.emplace_back(new T[kChunk]);
      std::memset(static_cast<void*>(chunks_.back().get()), kByte, kChunk * sizeof(T));
    }
  }
  void clear() { chunks_.clear(); }

 private:
  static constexpr u32 kBits = 14;
  static constexpr u32 kChunk = 1u << kBits;

  std::vector<std::unique_ptr<T[]>> chunks_;
};

}  // namespace prfaas
