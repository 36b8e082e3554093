// A set of holders: bit i is the holder of slot i. Up to 256 holders live inside the object.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace prfaas {

using u64 = std::uint64_t;

class Bits {
 public:
  explicit Bits(std::uint32_t words = 0) : words_(words) {
    if (words > kInline) more_.assign(words, 0);
  }

  u64* data() { return words_ > kInline ? more_.data() : inline_; }
  const u64* data() const { return words_ > kInline ? more_.data() : inline_; }
  std::uint32_t words() const { return words_; }

  bool any() const {
    for (std::uint32_t i = 0; i < words_; ++i)
      if (data()[i]) return true;
    return false;
  }
  bool has(std::uint32_t slot) const { return data()[slot >> 6] >> (slot & 63) & 1; }
  void set(std::uint32_t slot) { data()[slot >> 6] |= u64{1} << (slot & 63); }
  void reset(std::uint32_t slot) { data()[slot >> 6] &= ~(u64{1} << (slot & 63)); }

  std::uint32_t count() const {
    std::uint32_t total = 0;
    for (std::uint32_t i = 0; i < words_; ++i) total += __builtin_popcountll(data()[i]);
    return total;
  }

  void add(const u64* other) {
    for (std::uint32_t i = 0; i < words_; ++i) data()[i] |= other[i];
  }
  Bits& operator|=(const Bits& other) {
    add(other.data());
    return *this;
  }
  Bits& operator&=(const Bits& other) {
    for (std::uint32_t i = 0; i < words_; ++i) data()[i] &= other.data()[i];
    return *this;
  }
  // Takes the members of `other` away.
  Bits& operator-=(const Bits& other) {
    for (std::uint32_t i = 0; i < words_; ++i) data()[i] &= ~other.data()[i];
    return *this;
  }
  friend Bits operator&(Bits a, const Bits& b) { return a &= b; }
  friend Bits operator-(Bits a, const Bits& b) { return a -= b; }
  friend bool operator==(const Bits& a, const Bits& b) {
    return std::memcmp(a.data(), b.data(), a.words_ * sizeof(u64)) == 0;
  }
  friend bool operator!=(const Bits& a, const Bits& b) { return !(a == b); }

  // Calls `visit(slot)` for each member, lowest first.
  template <class Visit>
  void each(Visit visit) const {
    for (std::uint32_t i = 0; i < words_; ++i)
      for (u64 rest = data()[i]; rest; rest &= rest - 1)
        visit(i * 64 + static_cast<std::uint32_t>(__builtin_ctzll(rest)));
  }

  void widen(std::uint32_t words) {
    Bits wider(words);
    std::memcpy(wider.data(), data(), words_ * sizeof(u64));
    *this = wider;
  }

 private:
  static constexpr std::uint32_t kInline = 4;
  std::uint32_t words_;
  u64 inline_[kInline] = {};
  std::vector<u64> more_;
};

}  // namespace prfaas
