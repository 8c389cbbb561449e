#include "runtime/json.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "runtime/model_file.h"

namespace pykd::runtime {
namespace {

constexpr size_t kDeepest = 64;
constexpr size_t kMostDigits = 4300;
constexpr size_t kBrief = 60;

// Real numbers as long double, so that a whole number of 4300 digits arrives as a number, with its text.
using Parser = nlohmann::basic_json<std::map, std::vector, std::string, bool, std::int64_t, std::uint64_t, long double>;

// Takes the first code point off text, which is valid UTF-8.
char32_t take_code_point(std::string_view& text) {
  const auto first = static_cast<unsigned char>(text[0]);
  const size_t length = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  char32_t point = length == 1 ? first : first & (0x7Fu >> length);
  for (size_t i = 1; i < length; ++i) point = point << 6 | (static_cast<unsigned char>(text[i]) & 0x3F);
  text.remove_prefix(length);
  return point;
}

std::string shortened(std::string text) { return text.size() <= kBrief ? text : text.substr(0, kBrief - 3) + "..."; }

void print(std::string_view text, std::string& to) {
  const char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
  to += quote;
  while (!text.empty() && to.size() <= kBrief) {
    const char32_t point = take_code_point(text);
    if (point == U'\\' || point == static_cast<char32_t>(quote)) {
      (to += '\\') += static_cast<char>(point);
    } else if (point >= 0x20 && point < 0x7F) {
      to += static_cast<char>(point);
    } else if (point == U'\n' || point == U'\r' || point == U'\t') {
      (to += '\\') += point == U'\n' ? 'n' : point == U'\r' ? 'r' : 't';
    } else {
      const int digits = point < 0x100 ? 2 : point < 0x10000 ? 4 : 8;
      (to += '\\') += digits == 2 ? 'x' : digits == 4 ? 'u' : 'U';
      for (int shift = 4 * (digits - 1); shift >= 0; shift -= 4) to += "0123456789abcdef"[point >> shift & 15];
    }
  }
  to += quote;
}

void print(double number, std::string& to) {
  std::array<char, 32> digits;
  const std::string_view text(digits.data(), std::to_chars(digits.begin(), digits.end(), number).ptr);
  to += text;
  if (text.find_first_not_of("-0123456789") == text.npos) to += ".0";
}

void print(Json value, std::string& to) {
  switch (value.type()) {
    case JsonType::kNull: to += "None"; return;
    case JsonType::kBool: to += value.boolean() ? "True" : "False"; return;
    case JsonType::kWhole: to += std::to_string(value.whole()); return;
    case JsonType::kLargeWhole: to += value.text(); return;
    case JsonType::kReal: print(value.number(), to); return;
    case JsonType::kText: print(value.text(), to); return;
    case JsonType::kList:
    case JsonType::kObject: break;
  }
  const bool object = value.is(JsonType::kObject);
  to += object ? '{' : '[';
  bool key = true;
  for (auto each = value.begin(); each != value.end() && to.size() <= kBrief; ++each) {
    if (each != value.begin()) to += object && !key ? ": " : ", ";
    print(*each, to);
    key = !key;
  }
  to += object ? '}' : ']';
}

}  // namespace

// What the parser tells, one value after the other.
class Document::Builder : public nlohmann::json_sax<Parser> {
 public:
  Builder(Document& document, std::string_view text, const std::string& what)
      : nodes_(document.nodes_), texts_(document.texts_), document_(document), text_(text), what_(what) {}

  bool null() override { return add(JsonType::kNull, 0); }
  bool boolean(bool value) override { return add(JsonType::kBool, value); }
  bool number_integer(std::int64_t value) override { return add(JsonType::kWhole, static_cast<uint64_t>(value)); }
  bool number_unsigned(std::uint64_t value) override {
    return value <= INT64_MAX ? add(JsonType::kWhole, value) : add_text(JsonType::kLargeWhole, std::to_string(value));
  }

  bool number_float(long double rounded, const std::string& text) override {
    if (text.find_first_of(".eE") == text.npos) {
      if (text.size() - (text[0] == '-') > kMostDigits) {
        throw FormatError(what_ + " is not valid JSON: a number has more than " + std::to_string(kMostDigits) +
                          " digits");
      }
      return add_text(JsonType::kLargeWhole, text);
    }
    auto value = static_cast<double>(rounded);  // stays where the text is above or below what double holds
    std::from_chars(text.data(), text.data() + text.size(), value);
    return add(JsonType::kReal, std::bit_cast<uint64_t>(value));
  }

  bool string(std::string& text) override { return add_text(JsonType::kText, text); }
  bool key(std::string& text) override {
    count();
    return add_node(JsonType::kText, text.size(), put(text));
  }

  bool start_object(size_t) override { return open(JsonType::kObject); }
  bool start_array(size_t) override { return open(JsonType::kList); }
  bool end_array() override {
    nodes_[open_.back()].value = nodes_.size();
    open_.pop_back();
    return true;
  }
  bool end_object() override {
    const Json object(document_, open_.back());
    end_array();
    std::vector<std::string_view> keys;
    keys.reserve(object.size());
    for (auto each = object.begin(); each != object.end(); ++ ++each) keys.push_back((*each).text());
    std::sort(keys.begin(), keys.end());
    const auto twice = std::adjacent_find(keys.begin(), keys.end());
    if (twice != keys.end()) throw FormatError(what_ + " has the key " + brief(*twice) + " twice");
    return true;
  }

  bool binary(Parser::binary_t&) override { return false; }  // JSON as text has none
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    const std::string_view rest = text_.substr(std::min(position - (position > 0), text_.size()));
    for (const std::string_view word : {"NaN", "Infinity"}) {
      if (rest.starts_with(word)) throw FormatError(what_ + " holds " + std::string(word) + ", which is no number");
    }
    throw FormatError(what_ + " is not valid JSON at byte " + std::to_string(position));
  }

 private:
  void count() {
    if (!open_.empty()) ++nodes_[open_.back()].size;
  }

  uint64_t put(const std::string& text) {
    texts_ += text;
    return texts_.size() - text.size();
  }

  bool add_node(JsonType type, size_t size, uint64_t value) {
    nodes_.push_back({type, static_cast<uint32_t>(size), value});
    return true;
  }

  bool add(JsonType type, uint64_t value, size_t size = 0) {
    if (!open_.empty() && nodes_[open_.back()].type == JsonType::kList) count();
    return add_node(type, size, value);
  }

  bool add_text(JsonType type, const std::string& text) { return add(type, put(text), text.size()); }

  bool open(JsonType type) {
    if (open_.size() == kDeepest) {
      throw FormatError(what_ + " is not valid JSON: it is nested more than " + std::to_string(kDeepest) + " deep");
    }
    add(type, 0);
    open_.push_back(nodes_.size() - 1);
    return true;
  }

  std::deque<Node>& nodes_;
  std::string& texts_;
  const Document& document_;
  std::string_view text_;
  const std::string& what_;
  std::vector<size_t> open_;
};

Document::Document(std::string_view text, const std::string& what) {
  // The parser would skip a byte order mark, and end at a zero byte.
  if (text.starts_with("\xEF\xBB\xBF") || text.find('\0') != text.npos) {
    throw FormatError(what + " is not valid JSON: it has a zero byte or a byte order mark");
  }
  texts_.reserve(text.size());  // never more, as an escape is longer than what it stands for
  Builder builder(*this, text, what);
  Parser::sax_parse(text.begin(), text.end(), &builder);
  if (!root().is(JsonType::kObject)) throw FormatError(what + " should be a JSON object");
}

JsonType Json::type() const { return document_->nodes_[place_].type; }

bool Json::is_whole(int64_t least, int64_t most) const {
  return is(JsonType::kWhole) && whole() >= least && whole() <= most;
}

bool Json::is_number() const { return is(JsonType::kWhole) || is(JsonType::kLargeWhole) || is(JsonType::kReal); }

bool Json::boolean() const { return document_->nodes_[place_].value != 0; }

int64_t Json::whole() const { return static_cast<int64_t>(document_->nodes_[place_].value); }

double Json::number() const {
  if (is(JsonType::kWhole)) return static_cast<double>(whole());
  if (is(JsonType::kReal)) return std::bit_cast<double>(document_->nodes_[place_].value);
  double value = text()[0] == '-' ? -HUGE_VAL : HUGE_VAL;
  std::from_chars(text().data(), text().data() + text().size(), value);
  return value;
}

std::string_view Json::text() const {
  const auto& node = document_->nodes_[place_];
  return std::string_view(document_->texts_).substr(node.value, node.size);
}

Json::Iterator& Json::Iterator::operator++() {
  const auto& node = document->nodes_[place];
  place = node.type == JsonType::kList || node.type == JsonType::kObject ? node.value : place + 1;
  return *this;
}

Json::Iterator Json::begin() const { return {document_, place_ + 1}; }
Json::Iterator Json::end() const { return {document_, document_->nodes_[place_].value}; }
size_t Json::size() const { return document_->nodes_[place_].size; }

bool Json::find(std::string_view key, Json& found) const {
  for (auto each = begin(); each != end(); ++each) {
    const bool same = (*each).text() == key;
    ++each;
    if (same) return found = *each, true;
  }
  return false;
}

std::string brief(Json value) {
  std::string text;
  print(value, text);
  return shortened(text);
}

std::string brief(std::string_view value) {
  std::string text;
  print(value, text);
  return shortened(text);
}

bool is_printable(std::string_view text) {
  // Unicode's categories Cc, Cf, Co, Cs, Zl, Zp and, but for the space, Zs.
  static constexpr std::array<std::array<char32_t, 2>, 27> kHidden = {
      {{0x0, 0x1F},        {0x7F, 0xA0},        {0xAD, 0xAD},       {0x600, 0x605},     {0x61C, 0x61C},
       {0x6DD, 0x6DD},     {0x70F, 0x70F},      {0x890, 0x891},     {0x8E2, 0x8E2},     {0x1680, 0x1680},
       {0x180E, 0x180E},   {0x2000, 0x200F},    {0x2028, 0x202F},   {0x205F, 0x206F},   {0x3000, 0x3000},
       {0xD800, 0xF8FF},   {0xFEFF, 0xFEFF},    {0xFFF9, 0xFFFB},   {0x110BD, 0x110BD}, {0x110CD, 0x110CD},
       {0x13430, 0x1343F}, {0x1BCA0, 0x1BCA3},  {0x1D173, 0x1D17A}, {0xE0001, 0xE0001}, {0xE0020, 0xE007F},
       {0xF0000, 0xFFFFF}, {0x100000, 0x10FFFF}}};
  while (!text.empty()) {
    const char32_t point = take_code_point(text);
    for (const auto& [first, last] : kHidden) {
      if (point >= first && point <= last) return false;
    }
  }
  return true;
}

}  // namespace pykd::runtime
