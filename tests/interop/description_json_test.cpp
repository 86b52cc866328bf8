// SPDX-License-Identifier: BSL-1.0
// The JSON description that we write, read by QEMU's rules. The reader of this test knows nothing of the library's own:
// it keeps repeated keys and the order of all keys, and it accounts for every byte of every section. It is tried on
// QEMU's descriptions first, which must pass; then ours must pass, and be what QEMU wrote for the same devices.
#include "support/catch.hpp"
#include "support/qemu.hpp"
#include "support/recorded_stream.hpp"

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

using namespace vmstate::tests;

namespace {

// ---- JSON, keys repeated or not -------------------------------------------------------------------------------

struct value {
    enum class kind { number, text, object, array } is = kind::number;
    std::int64_t number = 0;
    std::string text;
    struct member;
    std::vector<member> members; // of an object; of an array, without names

    const value* find(std::string_view key) const;
    std::vector<std::string> keys() const;
};
struct value::member {
    std::string first;
    value second;
};
inline const value* value::find(std::string_view key) const {
    const auto found =
        std::find_if(members.begin(), members.end(), [&](const member& one) { return one.first == key; });
    return found == members.end() ? nullptr : &found->second;
}
inline std::vector<std::string> value::keys() const {
    std::vector<std::string> names;
    for (const member& one : members)
        names.push_back(one.first);
    return names;
}

/// What QEMU's descriptions are made of: objects, arrays, strings without escapes, integers.
class json_reader {
public:
    explicit json_reader(std::string_view text) : text_(text) {}

    value read_all() {
        value all = read();
        blank();
        if (at_ != text_.size()) fail("something behind the end");
        return all;
    }

private:
    value read() {
        blank();
        value result;
        switch (peek()) {
        case '{':
            result.is = value::kind::object;
            break;
        case '[':
            result.is = value::kind::array;
            break;
        case '"':
            result.is = value::kind::text;
            result.text = read_text();
            return result;
        default:
            return read_number();
        }
        const char end = next() == '{' ? '}' : ']';
        for (blank(); peek() != end;) {
            std::string name;
            if (end == '}') {
                blank();
                name = read_text();
                expect(':');
            }
            result.members.push_back({std::move(name), read()});
            blank();
            if (peek() == end) break;
            expect(',');
            blank();
            if (peek() == end) fail("a comma at the end");
        }
        next();
        return result;
    }
    std::string read_text() {
        expect('"');
        std::string text;
        while (peek() != '"') {
            if (peek() == '\\' || static_cast<unsigned char>(peek()) < ' ')
                fail("a character that QEMU has no need of");
            text += next();
        }
        next();
        return text;
    }
    value read_number() {
        value result;
        const bool negative = peek() == '-';
        if (negative) next();
        if (std::isdigit(static_cast<unsigned char>(peek())) == 0) fail("no value");
        while (at_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at_])) != 0)
            result.number = result.number * 10 + (next() - '0');
        if (negative) result.number = -result.number;
        return result;
    }
    void blank() {
        while (at_ < text_.size() && text_[at_] == ' ')
            ++at_;
    }
    char peek() {
        if (at_ == text_.size()) fail("the end");
        return text_[at_];
    }
    char next() {
        const char c = peek();
        ++at_;
        return c;
    }
    void expect(char c) {
        blank();
        if (next() != c) fail(std::string("no ") + c);
    }
    [[noreturn]] void fail(const std::string& what) const {
        throw std::runtime_error("JSON, at " + std::to_string(at_) + ": " + what);
    }

    std::string_view text_;
    std::size_t at_ = 0;
};

// ---- QEMU's rules ---------------------------------------------------------------------------------------------

/// Thrown at the first rule that is broken, with the place.
struct broken_rule : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// An entry as it is compared.
struct entry {
    std::string path; // names of the devices, fields and subsections above, and its own
    std::string type;
    std::int64_t size = 0;
    std::int64_t array_len = 1;
    std::int64_t index = -1;

    friend bool operator==(const entry&, const entry&) = default;
};
std::ostream& operator<<(std::ostream& out, const entry& e) {
    return out << e.path << ' ' << e.type << " size " << e.size << " array_len " << e.array_len << " index "
               << e.index;
}

/// One device's object held to the rules, and taken apart.
class description_checker {
public:
    explicit description_checker(const value& device) : device_(device) {}

    /// The bytes that the description accounts for.
    std::int64_t check() {
        path_ = text(device_, "name");
        number(device_, "instance_id");
        if (device_.find("vmsd_name") == nullptr) {
            // An old-style function: nothing but its size, twice.
            require(device_.keys() == std::vector<std::string>{"name", "instance_id", "size", "fields"},
                "keys of an old-style device");
            const value& fields = member(device_, "fields", value::kind::array);
            require(fields.members.size() == 1, "one field");
            const value& field = fields.members.front().second;
            require(text(field, "name") == "data" && text(field, "type") == "buffer", "a buffer called data");
            require(number(field, "size") == number(device_, "size"), "one size");
            return number(device_, "size");
        }
        require(device_.members.at(0).first == "name" && device_.members.at(1).first == "instance_id",
            "name and instance first");
        std::size_t at = 2;
        const std::int64_t size = check_body(device_, at);
        require(at == device_.members.size(), "nothing behind the body");
        return size;
    }
    const std::vector<entry>& entries() const { return entries_; }

private:
    void require(bool holds, const std::string& rule) const {
        if (!holds) throw broken_rule(path_ + ": " + rule);
    }
    const value& member(const value& object, std::string_view key, value::kind is) const {
        const value* found = object.find(key);
        require(found != nullptr && found->is == is, "key " + std::string(key));
        return *found;
    }
    const std::string& text(const value& object, std::string_view key) const {
        return member(object, key, value::kind::text).text;
    }
    std::int64_t number(const value& object, std::string_view key) const {
        return member(object, key, value::kind::number).number;
    }

    /// vmsd_name, version, fields, subsections: from member `at` on, which is moved behind them.
    std::int64_t check_body(const value& object, std::size_t& at) {
        const auto& members = object.members;
        const auto is = [&](std::size_t i, const char* key, value::kind kind) {
            return i < members.size() && members[i].first == key && members[i].second.is == kind;
        };
        require(is(at, "vmsd_name", value::kind::text), "vmsd_name");
        require(is(at + 1, "version", value::kind::number), "version");
        require(is(at + 2, "fields", value::kind::array), "fields");
        const std::string vmsd_name = members[at].second.text;
        const value& fields = members[at + 2].second;
        at += 3;
        std::int64_t size = check_fields(fields);
        if (is(at, "subsections", value::kind::array)) {
            const value& subsections = members[at++].second;
            require(!subsections.members.empty(), "no empty list of subsections");
            for (const auto& [none, subsection] : subsections.members) {
                require(subsection.is == value::kind::object, "a subsection's object");
                const std::string& name = text(subsection, "vmsd_name");
                require(name.starts_with(vmsd_name) && name != vmsd_name,
                    "a subsection's name begins with its parent's");
                const std::string above = path_;
                path_ += "/:" + name;
                std::size_t inside = 0;
                size += 1 + 1 + static_cast<std::int64_t>(name.size()) + 4 + check_body(subsection, inside);
                require(inside == subsection.members.size(), "nothing behind the body");
                path_ = above;
            }
        }
        return size;
    }

    /// Names are unique, or numbered name[k]; elements of one array follow each other.
    std::int64_t check_fields(const value& fields) {
        std::int64_t size = 0;
        std::map<std::string, std::int64_t> next_index; // of names whose entries are elements
        std::set<std::string> plain;
        std::map<std::string, std::int64_t> next_number; // of name[k]
        for (const auto& [none, field] : fields.members) {
            require(field.is == value::kind::object, "a field's object");
            const std::string above = path_;
            const std::string& name = text(field, "name");
            path_ += '/' + name;
            const value* index = field.find("index");
            if (index == nullptr || index->number == 0) {
                require(plain.insert(name).second, "a name of its own");
                // The numbers are those of QEMU's table: what isn't in this stream leaves a gap.
                if (const auto bracket = name.find('['); bracket != std::string::npos && name.back() == ']') {
                    const std::string base = name.substr(0, bracket);
                    const std::int64_t k = std::stoll(name.substr(bracket + 1));
                    require(name == base + '[' + std::to_string(k) + ']' && k >= next_number[base],
                        "repeated names are numbered in order");
                    next_number[base] = k + 1;
                }
            }
            if (index != nullptr)
                require(index->number == next_index[name]++, "index " + std::to_string(next_index[name] - 1));
            size += check_field(field, name);
            path_ = above;
        }
        for (const auto& [base, count] : next_number)
            require(!plain.contains(base), "of " + base + " either all are numbered or none");
        return size;
    }

    std::int64_t check_field(const value& field, const std::string& name) {
        require(field.members.at(0).first == "name", "name first");
        entry e{path_, text(field, "type"), number(field, "size")};
        require(e.size >= 0, "a size");
        std::size_t at = 1;
        if (const value* array_len = field.find("array_len")) {
            require(field.members[at++].first == "array_len", "array_len second");
            require(array_len->number > 1, "array_len of more than one element");
            require(field.find("index") == nullptr, "array_len or index");
            e.array_len = array_len->number;
        }
        if (const value* index = field.find("index")) {
            require(field.members[at++].first == "index", "index second");
            e.index = index->number;
        }
        require(field.members.at(at++).first == "type", "then the type");
        entries_.push_back(e);

        const std::int64_t width = width_of(e.type);
        if (e.type == "struct") {
            require(field.members.at(at).first == "struct", "struct after the type");
            const value& body = field.members[at++].second;
            require(body.is == value::kind::object, "a struct's object");
            if (!body.members.empty()) { // a null pointer has nothing inside, and is one byte
                std::size_t inside = 0;
                require(check_body(body, inside) == e.size, "the struct's fields are its size");
                require(inside == body.members.size(), "nothing behind the body");
            }
        } else if (e.type == "tmp" || e.type == "vstruct") {
            require(check_body(field, at) == e.size, "the nested fields are its size");
        } else if (e.type == "qtailq" || e.type == "qlist" || e.type == "gtree") {
            std::int64_t size = e.type == "gtree" ? 4 : 0;
            while (field.members.at(at).first == "vmsd_name")
                size += 1 + check_body(field, at);
            require(e.type == "gtree" || size + 1 == e.size, "the elements are its size");
        } else if (width != 0) {
            require(e.size == width, "the type's width");
        }
        require(
            field.members.at(at).first == "size" && at + 1 == field.members.size(), "size last, of " + name);
        return e.size * e.array_len;
    }

    /// Bytes of those types that always have as many; else 0.
    static std::int64_t width_of(std::string type) {
        for (const char* rule : {" equal", " le"})
            if (type.ends_with(rule)) type.resize(type.size() - std::string_view(rule).size());
        static const std::map<std::string, std::int64_t> widths{{"bool", 1}, {"int8", 1}, {"uint8", 1},
            {"int16", 2}, {"uint16", 2}, {"int32", 4}, {"uint32", 4}, {"int64", 8}, {"uint64", 8},
            {"timer", 8}, {"CPU_Double_U", 8}};
        const auto found = widths.find(type);
        return found == widths.end() ? 0 : found->second;
    }

    const value& device_;
    std::string path_;
    std::vector<entry> entries_;
};

struct checked_device {
    std::string name;
    std::int64_t instance_id = 0;
    std::int64_t size = 0;
    std::vector<entry> entries;
    std::string vmsd_name;
    std::int64_t version = -1;
};

/// The whole text; what it accounts for is held against the stream's own sections.
std::vector<checked_device> check_description(std::string_view text, const recorded_stream& stream) {
    const value all = json_reader(text).read_all();
    std::vector<std::string> keys = all.keys();
    std::erase(keys, "configuration"); // QEMU 8.2 and later describe that section, too
    REQUIRE(keys == std::vector<std::string>{"page_size", "devices"});
    CHECK(all.find("page_size")->number == 4096);
    std::vector<checked_device> devices;
    for (const auto& [none, device] : all.find("devices")->members) {
        description_checker checker(device);
        const std::int64_t size = checker.check();
        const value* vmsd_name = device.find("vmsd_name");
        devices.push_back({device.find("name")->text, device.find("instance_id")->number, size,
            checker.entries(), vmsd_name != nullptr ? vmsd_name->text : "",
            vmsd_name != nullptr ? device.find("version")->number : -1});
    }
    REQUIRE(devices.size() == stream.sections.size());
    for (std::size_t i = 0; i < devices.size(); ++i) {
        CAPTURE(devices[i].name, i);
        CHECK(devices[i].name == stream.sections[i].header.idstr);
        CHECK(devices[i].instance_id == static_cast<std::int64_t>(stream.sections[i].header.instance_id));
        CHECK(devices[i].size == static_cast<std::int64_t>(stream.sections[i].body.size()));
        if (devices[i].version != -1)
            CHECK(devices[i].version == static_cast<std::int64_t>(stream.sections[i].header.version_id));
    }
    return devices;
}

std::string file_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

recorded_stream recorded(const std::string& machine, bool programmed) {
    qemu source({.machine = machine,
        .rom = programmed ? guest_rom("devices") : std::filesystem::path(),
        .stopped = !programmed});
    if (programmed) source.wait_serial("READY\n");
    return record(source);
}

} // namespace

TEST_CASE("the checker finds what is wrong") {
    const auto check = [](const std::string& device) {
        const value object = json_reader(device).read_all();
        return description_checker(object).check();
    };
    const std::string head = R"({"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, )";
    const std::string u8 = R"({"name": "a", "type": "uint8", "size": 1})";
    CHECK(check(head + R"("fields": [)" + u8 +
                R"(, {"name": "b", "array_len": 3, "type": "uint16", "size": 2}]})") == 7);
    CHECK(check(head + R"("fields": [], "subsections": [{"vmsd_name": "d/s", "version": 1, "fields": [)" +
                u8 + "]}]}") == 10);
    CHECK_THROWS_AS(check(head + R"("fields": [)" + u8 + ", " + u8 + "]}"), broken_rule);
    CHECK_THROWS_AS(check(head + R"("fields": [{"name": "a", "type": "uint8", "size": 2}]})"), broken_rule);
    CHECK_THROWS_AS(check(head + R"("fields": [{"name": "a", "array_len": 1, "type": "uint8", "size": 1}]})"),
        broken_rule);
    CHECK_THROWS_AS(
        check(head + R"("fields": [{"name": "a", "index": 1, "type": "uint8", "size": 1}]})"), broken_rule);
    CHECK_THROWS_AS(
        check(
            head +
            R"("fields": [{"name": "a[1]", "type": "uint8", "size": 1}, {"name": "a[0]", "type": "uint8", "size": 1}]})"),
        broken_rule);
    CHECK_THROWS_AS(
        check(
            head +
            R"("fields": [{"name": "a", "type": "struct", "struct": {"vmsd_name": "n", "version": 1, "fields": [)" +
            u8 + R"(]}, "size": 2}]})"),
        broken_rule);
    CHECK_THROWS_AS(
        check(head + R"("fields": [], "subsections": [{"vmsd_name": "e", "version": 1, "fields": []}]})"),
        broken_rule);
    CHECK_THROWS_AS(json_reader("{\"a\": 1,}").read_all(), std::runtime_error);
}

TEST_CASE("our description is QEMU's, entry by entry") {
    VMSTATE_REQUIRE_QEMU();
    {
        // From QEMU 10 on the elements of an array that can't be described as one have entries of one name, without an
        // index: not what these rules, which are those of 7.2 to 9, say of a description. We read both.
        qemu probe({.machine = "none", .stopped = true});
        if (probe.version() >= 1000)
            return skip("the installed QEMU is 10 or newer; its description follows other rules than ours");
    }
    const std::string machine = GENERATE("pc", "q35", "isapc", "microvm", "none");
    const bool programmed = GENERATE(false, true);
    if (machine == "none" && programmed) return;
    CAPTURE(machine, programmed);
    const recorded_stream original = recorded(machine, programmed);
    const auto theirs = check_description(original.json(), original);

    replica ours(original);
    const auto loaded = ours.load(original.bytes);
    REQUIRE((loaded ? "" : loaded.error().message()) == "");
    auto saved = ours.save();
    REQUIRE((saved ? "" : saved.error().message()) == "");
    const recorded_stream rewritten(std::move(*saved));
    const auto written = check_description(rewritten.json(), rewritten);

    std::set<std::string> renamed;
    std::size_t typed = 0;
    REQUIRE(written.size() == theirs.size());
    for (std::size_t i = 0; i < written.size(); ++i) {
        CAPTURE(written[i].name, written[i].instance_id);
        CHECK(written[i].vmsd_name == theirs[i].vmsd_name);
        CHECK(written[i].version == theirs[i].version);
        const auto* section =
            ours.machine.find_section(written[i].name, static_cast<std::uint32_t>(written[i].instance_id));
        typed += section != nullptr && !section->is_carried() ? 1 : 0;
        // From QEMU 9.0 on the end of the buffer with the run state's name is three fields of its own; ours are 7.2's.
        if (written[i].name == "globalstate" && theirs[i].entries.size() == 5) {
            CHECK(written[i].size == theirs[i].size);
            continue;
        }
        REQUIRE(written[i].entries.size() == theirs[i].entries.size());
        for (std::size_t k = 0; k < written[i].entries.size(); ++k) {
            entry mine = written[i].entries[k];
            const entry& other = theirs[i].entries[k];
            if (mine.path != other.path) {
                renamed.insert(
                    written[i].name + ": " + file_name(other.path) + " -> " + file_name(mine.path));
                mine.path = other.path;
            }
            CHECK(mine == other);
        }
    }
    CHECK(typed >= 2);

    // A field is called as its member is. These few QEMU calls by an expression, or keeps in another struct.
    for (const std::string& name : renamed)
        UNSCOPED_INFO(name);
    const std::set<std::string> known{
        "i8254: channels[0].irq_disabled -> irq_disabled",
        "i8254: channels[0].next_transition_time -> irq_timer",
        "ps2kbd: parent_obj.queue.cwptr -> cwptr",
        "ps2kbd: queue.count -> count",
        "ps2kbd: queue.data -> data",
        "ps2kbd: queue.rptr -> rptr",
        "ps2kbd: queue.wptr -> wptr",
        "ps2mouse: queue.count -> count",
        "ps2mouse: queue.data -> data",
        "ps2mouse: queue.rptr -> rptr",
        "ps2mouse: queue.wptr -> wptr",
    };
    CHECK(std::includes(known.begin(), known.end(), renamed.begin(), renamed.end()));
}
