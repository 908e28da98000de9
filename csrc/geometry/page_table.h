// Which pages of a pool hold which tokens of which stream. Metadata only: keys and values are never moved; eviction
// hands a page whose tokens are all out of sight to the newest tokens.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace selfforcing {

// Token t of a stream belongs to its logical page t / page_size. A stream keeps the logical pages that hold sink tokens
// for ever, and of the others a run that moves forward. Its row lists the pages of these logical pages in order; a
// token's position is its place in that row: row index * page_size + t % page_size.
//
// A page that a reader still needs is pinned (one count per reader); a released page becomes free once nobody pins it.
class PageTable {
 public:
  static constexpr int32_t kNumSpans = 2;  // sink, window
  // Visible positions, half-open, sorted, disjoint; an empty one has start == end.
  using Spans = std::array<std::array<int64_t, 2>, kNumSpans>;

  // Throws std::invalid_argument unless num_streams, page_size >= 1 and sink_tokens >= 0.
  PageTable(int64_t num_streams, int64_t page_size, int64_t sink_tokens);

  int64_t num_streams() const { return static_cast<int64_t>(streams_.size()); }
  int64_t page_size() const { return page_size_; }
  int64_t num_pages() const { return static_cast<int64_t>(references_.size()); }
  int64_t num_free_pages() const { return static_cast<int64_t>(free_pages_.size()); }

  // Adds pages to the pool; their numbers follow those that are there.
  void add_pages(int64_t count);

  // Pages that append(stream, num_tokens) would take from the free list.
  int64_t pages_needed(int64_t stream, int64_t num_tokens) const;

  // Makes room for the next tokens of a stream. Throws std::length_error when the free pages do not suffice; nothing is
  // changed then.
  void append(int64_t stream, int64_t num_tokens);

  // Pages that release_before(stream, first_visible) would make free.
  int64_t releasable(int64_t stream, int64_t first_visible) const;

  // Forgets the tokens before `first_visible` that are not in the sink; pages that hold no others are released.
  void release_before(int64_t stream, int64_t first_visible);

  // Forgets every token of every stream.
  void clear();

  int64_t num_tokens(int64_t stream) const { return at(stream).num_tokens; }
  // A stream's row.
  const std::vector<int32_t>& pages(int64_t stream) const { return at(stream).row; }
  int64_t position(int64_t stream, int64_t token) const;

  // For each entry of `first_visible` the positions of a stream's tokens [0, num_tokens) that are in the sink or not
  // before it. Tokens whose page was released are left out.
  std::vector<Spans> spans(int64_t stream, const std::vector<int64_t>& first_visible, int64_t num_tokens) const;

  // A reader of pages: they are not handed out again until unpin() was called as often as pin().
  void pin(const std::vector<int32_t>& pages);
  void unpin(const std::vector<int32_t>& pages);

 private:
  struct Stream {
    std::vector<int32_t> row;
    int64_t num_tokens = 0;
    int64_t num_released = 0;  // logical pages after the sink's that were given back
  };

  const Stream& at(int64_t stream) const;
  // Pages of a row, after the sink's, that hold only tokens before `first_visible`.
  int64_t pages_before(const Stream& stream, int64_t first_visible) const;
  void release(int32_t page);

  int64_t page_size_;
  int64_t sink_tokens_;
  int64_t sink_pages_;
  std::vector<Stream> streams_;
  std::vector<int32_t> references_;  // per page: one for the stream that holds it, one per pin
  std::vector<int32_t> free_pages_;  // the last is taken first
};

}  // namespace selfforcing
