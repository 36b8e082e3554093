// A set of holders: bit i is the holder of slot i. Up to 256 holders live inside the object.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

namespace prfaas {

using u64 = std::uint64_t;

class Bits {
 public:
  explicit Bits(std::uint32_t words) : words_(std::max(words, kInline)) {
    if (words_ > kInline) more_.reset(new u64[words_]());
  }
  Bits(const u64* row, std::uint32_t words) : Bits(words) { std::copy_n(row, words, data()); }
  Bits(const Bits& other) : words_(other.words_) {
    std::copy_n(other.inline_, kInline, inline_);
    if (!other.more_) return;
    more_.reset(new u64[words_]);
    std::copy_n(other.more_.get(), words_, more_.get());
  }
  Bits& operator=(const Bits& other) { return *this = Bits(other); }
  Bits(Bits&&) = default;
  Bits& operator=(Bits&&) = default;

  const u64* data() const { return more_ ? more_.get() : inline_; }

  bool any() const {
    if (!more_) {
      u64 all = 0;
      for (std::uint32_t i = 0; i < kInline; ++i) all |= inline_[i];
      return all;
    }
    return std::any_of(more_.get(), more_.get() + words_, [](u64 word) { return word; });
  }
  bool has(std::uint32_t slot) const { return data()[slot >> 6] >> (slot & 63) & 1; }
  void set(std::uint32_t slot) { data()[slot >> 6] |= u64{1} << (slot & 63); }
  void reset(std::uint32_t slot) { data()[slot >> 6] &= ~(u64{1} << (slot & 63)); }

  // Adds the members of a row of `words` words.
  void add(const u64* row, std::uint32_t words) {
    u64* mine = data();
    for (std::uint32_t i = 0; i < words; ++i) mine[i] |= row[i];
  }
  // Keeps only the members of a row, or takes them away.
  void keep(const u64* row, std::uint32_t words) {
    u64* mine = data();
    for (std::uint32_t i = 0; i < words; ++i) mine[i] &= row[i];
  }
  void take(const u64* row, std::uint32_t words) {
    u64* mine = data();
    for (std::uint32_t i = 0; i < words; ++i) mine[i] &= ~row[i];
  }
  Bits& operator|=(const Bits& other) {
    return with(other, [](u64& mine, u64 theirs) { mine |= theirs; });
  }
  Bits& operator&=(const Bits& other) {
    return with(other, [](u64& mine, u64 theirs) { mine &= theirs; });
  }
  // Takes the members of `other` away.
  Bits& operator-=(const Bits& other) {
    return with(other, [](u64& mine, u64 theirs) { mine &= ~theirs; });
  }
  friend Bits operator&(Bits a, const Bits& b) { return std::move(a &= b); }
  friend Bits operator-(Bits a, const Bits& b) { return std::move(a -= b); }
  friend bool operator==(const Bits& a, const Bits& b) {
    u64 different = 0;
    if (!a.more_) {
      for (std::uint32_t i = 0; i < kInline; ++i) different |= a.inline_[i] ^ b.inline_[i];
      return !different;
    }
    return std::equal(a.more_.get(), a.more_.get() + a.words_, b.more_.get());
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
    wider.add(data(), words_);
    *this = std::move(wider);
  }

 private:
  static constexpr std::uint32_t kInline = 4;

  u64* data() { return more_ ? more_.get() : inline_; }

  // Loops of a length known to the compiler where the words are inside: this is the inner loop of a match.
  template <class Change>
  Bits& with(const Bits& other, Change change) {
    if (!more_) {
      for (std::uint32_t i = 0; i < kInline; ++i) change(inline_[i], other.inline_[i]);
    } else {
      for (std::uint32_t i = 0; i < words_; ++i) change(more_[i], other.more_[i]);
    }
    return *this;
  }

  std::uint32_t words_;
  u64 inline_[kInline] = {};
  std::unique_ptr<u64[]> more_;
};

}  // namespace prfaas
