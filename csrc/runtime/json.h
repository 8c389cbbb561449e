// JSON out of a file that anyone may have written. A document takes at most about ten times its text's bytes.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>

namespace pykd::runtime {

enum class JsonType : uint8_t { kNull, kBool, kWhole, kLargeWhole, kReal, kText, kList, kObject };

class Document;

// A value of a document, which must outlive it. A large whole number, one that int64 cannot hold, is known by its text.
class Json {
 public:
  Json(const Document& document, uint64_t place) : document_(&document), place_(place) {}

  JsonType type() const;
  bool is(JsonType type) const { return this->type() == type; }
  bool is_whole(int64_t least, int64_t most) const;
  bool is_number() const;

  bool boolean() const;
  int64_t whole() const;
  double number() const;          // of whole and real numbers; infinite where double cannot hold it
  std::string_view text() const;  // of texts, UTF-8, and of large whole numbers

  // Of a list: its items. Of an object: its keys, in the file's order, each with its value behind it.
  struct Iterator {
    const Document* document;
    uint64_t place;

    Json operator*() const { return {*document, place}; }
    Iterator& operator++();
    bool operator==(const Iterator&) const = default;
  };
  Iterator begin() const;
  Iterator end() const;
  template <typename Holds>
  bool all(Holds holds) const {
    for (const Json each : *this) {
      if (!holds(each)) return false;
    }
    return true;
  }
  size_t size() const;  // number of items, or of keys

  bool find(std::string_view key, Json& found) const;  // false, and found as it was, where the object lacks the key

 private:
  const Document* document_;
  uint64_t place_;
};

class Document {
 public:
  // Throws FormatError, which calls the text `what`, where it is no JSON object (UTF-8, nested at most 64 deep, whole
  // numbers of at most 4300 digits), or an object in it has a key twice.
  Document(std::string_view text, const std::string& what);
  Document(const Document&) = delete;
  Document& operator=(const Document&) = delete;

  Json root() const { return {*this, 0}; }

 private:
  friend class Json;
  class Builder;

  struct Node {
    JsonType type;
    uint32_t size;   // of a text in bytes, of a list in items, of an object in keys
    uint64_t value;  // of a number its bits, of a text its place in texts_, of a list or object the node after it
  };
  std::deque<Node> nodes_;  // a list or an object before what is in it
  std::string texts_;
};

// For a sentence: in at most 60 ASCII characters without control characters, as Python would write it.
std::string brief(Json value);
std::string brief(std::string_view text);

// One line of UTF-8 without characters that control, direct or hide what is shown, or stand for nothing.
bool is_printable(std::string_view text);

}  // namespace pykd::runtime
