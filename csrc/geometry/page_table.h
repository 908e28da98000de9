// Which pages of a pool hold which tokens of which stream. Metadata only: keys and values are never moved; eviction
// hands a page whose tokens are all out of sight to the newest tokens.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace selfforcing {

// Token t of a stream belongs to its logical page t / page_size. A stream's row lists the pages of the logical pages
// that it still holds, in order; a token's position is its place in that row: row index * page_size + t % page_size.
//
// A row is kept as runs of consecutive logical pages: with a window and a sink there are two, however long the window.
// What happens once a block (advance, retain, position, copy_rows) looks at runs, at pages that leave and at pages that
// are written; the rest of a row is moved as memory. Only pin and what is rare look at every page: fork, close, stats.
//
// Streams may share pages (fork). A page that a reader still needs is pinned; a page becomes free once no stream holds
// it and no reader pins it. Before tokens are written, pages that others read there are replaced by copies.
class PageTable {
 public:
  // Tokens [first, second).
  using Range = std::pair<int64_t, int64_t>;
  using Ranges = std::vector<Range>;  // sorted, disjoint
  // Pages whose content must be copied: from first to second.
  using Copies = std::vector<std::pair<int32_t, int32_t>>;

  // What a stream does next: keep the pages that hold any of `kept`, write `written`. `again`: these tokens are there
  // already and may be written in part only, in some layers before others.
  struct Step {
    int64_t stream;
    Ranges kept;
    Range written;
    bool again;
  };
  struct Advanced {
    int64_t shortage = 0;
    Copies copies;
  };

  struct Stats {
    int64_t used = 0;    // held by a stream
    int64_t shared = 0;  // by more than one
    int64_t pinned = 0;  // held by no stream any more, but by a reader
  };

  // Throws std::invalid_argument unless page_size >= 1.
  explicit PageTable(int64_t page_size);

  int64_t page_size() const { return page_size_; }
  int64_t num_pages() const { return static_cast<int64_t>(pages_.size()); }
  int64_t num_free_pages() const { return static_cast<int64_t>(free_pages_.size()); }
  Stats stats() const;

  // Adds pages to the pool; their numbers follow those that are there.
  void add_pages(int64_t count);

  // A new stream without tokens; its number is never given to another.
  int64_t open();
  // A new stream that holds the same pages.
  int64_t fork(int64_t stream);
  void close(int64_t stream);

  // Gives streams pages for tokens that nobody else reads: new ones, and copies of those that are shared or, in these
  // tokens, pinned; before that, gives back the pages that they do not keep. Either all of it is done, or nothing and
  // `shortage` says how many free pages are missing.
  Advanced advance(const std::vector<Step>& steps);

  // Gives back a stream's pages that hold none of these tokens.
  void retain(int64_t stream, const Ranges& tokens);

  // A stream's row.
  const std::vector<int32_t>& row(int64_t stream) const { return at(stream).pages; }
  int64_t row_length(int64_t stream) const { return static_cast<int64_t>(at(stream).pages.size()); }
  // Rows of several streams into a table with `stride` entries a row, which must not be shorter.
  void copy_rows(const std::vector<int64_t>& streams, int32_t* table, int64_t stride) const;

  // Where tokens stand, found among the runs. Of tokens that are not all held, those that are held up to the end; none:
  // an empty span.
  Range position(int64_t stream, Range tokens) const;

  // A reader of the tokens [0, num_tokens) of a stream, as far as it holds them; returns the number to unpin.
  int64_t pin(const std::vector<int64_t>& streams, const std::vector<int64_t>& num_tokens);
  void unpin(int64_t reader);

 private:
  struct Page {
    int32_t streams = 0, pins = 0;
    int32_t pinned_slots = 0;  // the slots before this one may be read by those who pin the page
  };
  // Consecutive logical pages, and the places of their pages in the row.
  struct Run {
    int64_t logical, index, count;
    int64_t logical_end() const { return logical + count; }
  };
  struct Row {
    std::vector<int32_t> pages;
    std::vector<Run> runs;  // sorted; between two of them logical pages are missing
  };
  // What was done to the counts and the free pages, in order.
  struct Change {
    int32_t page;
    bool taken;  // else given back
  };
  using Changes = std::vector<Change>;

  const Row& at(int64_t stream) const;
  // The run that a logical page lies in; nullptr if it is not held.
  static const Run* find(const Row& row, int64_t logical);
  static void insert(Row& row, int64_t logical, int32_t page);
  void keep(Row& row, const Ranges& tokens, Changes& changes);
  // Prepares one stream's write; a page that is missing is counted instead of taken.
  void prepare_write(const Step& step, Advanced& result, Changes& changes);
  int32_t take(Changes& changes);  // -1: none is free
  void give_back(int32_t page, Changes& changes);
  void undo(const Changes& changes);
  // Whether a stream may not write the slots from `first_slot` on of a page that it holds.
  bool must_copy(const Page& page, int64_t first_slot) const {
    return page.streams > 1 || (page.pins > 0 && first_slot < page.pinned_slots);
  }
  // Logical pages that hold any of these tokens.
  Ranges pages_of(const Ranges& tokens) const;
  void free_if_unused(int32_t page);

  int64_t page_size_;
  std::unordered_map<int64_t, Row> streams_;
  std::unordered_map<int64_t, std::vector<int32_t>> readers_;
  int64_t next_stream_ = 0, next_reader_ = 0;
  std::vector<Page> pages_;
  std::vector<int32_t> free_pages_;  // the last is taken first
};

}  // namespace selfforcing
