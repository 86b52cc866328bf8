// SPDX-License-Identifier: BSL-1.0
// A real Linux for a QEMU to boot: the kernel of Debian's linux-image-cloud-amd64 and an initramfs made here, of the static
// busybox of busybox-static, the modules that it needs and a script. Depends on the standard library alone.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vmstate::tests {

/// An archive as the kernel unpacks it into its first file system (newc, Documentation/driver-api/early-userspace).
class initramfs {
public:
    void directory(const std::string& path) { entry(path, 0040755, {}); }
    void file(const std::string& path, std::string_view content, bool executable = false) {
        entry(path, executable ? 0100755 : 0100644, content);
    }
    void write(const std::filesystem::path& to) {
        entry("TRAILER!!!", 0, {});
        std::ofstream out(to, std::ios::binary);
        out << bytes_;
        if (!out.flush()) throw std::runtime_error("cannot write " + to.string());
    }

private:
    void entry(const std::string& path, unsigned mode, std::string_view content) {
        // Inode, mode, links, owner, group, time, size, four of devices, the name's size with its end, no checksum.
        const std::array<std::size_t, 13> fields{++inode_, mode, 1, 0, 0, 0, content.size(), 0, 0, 0, 0, path.size() + 1, 0};
        bytes_ += "070701";
        for (const std::size_t field : fields) {
            char digits[9];
            std::snprintf(digits, sizeof digits, "%08X", static_cast<unsigned>(field));
            bytes_ += digits;
        }
        bytes_ += path;
        bytes_ += '\0';
        align();
        bytes_ += content;
        align();
    }
    void align() { bytes_.resize((bytes_.size() + 3) / 4 * 4); }

    std::string bytes_;
    std::size_t inode_ = 0;
};

/// What of it this machine has.
struct linux_guest {
    std::filesystem::path kernel;
    std::filesystem::path modules; ///< /lib/modules/<release>
    std::filesystem::path busybox;

    /// Nothing, and the reason in `why`, where a part isn't there.
    static std::optional<linux_guest> find(std::string& why) {
        linux_guest found;
        std::error_code ignored;
        for (const auto& one : std::filesystem::directory_iterator("/boot", ignored)) {
            const std::string name = one.path().filename().string();
            if (!name.starts_with("vmlinuz-")) continue;
            const std::filesystem::path modules = "/lib/modules/" + name.substr(8);
            // The cloud kernel is the smaller one, and boots faster.
            const bool better = found.kernel.empty() || name.find("cloud") != name.npos;
            if (better && exists(modules / "modules.dep")) {
                found.kernel = one.path();
                found.modules = modules;
            }
        }
        if (found.kernel.empty()) {
            why = "no kernel in /boot with its modules (Debian: linux-image-cloud-amd64)";
            return std::nullopt;
        }
        found.busybox = "/bin/busybox";
        if (!exists(found.busybox) || text_of(found.busybox).find("/ld-linux") != std::string::npos) {
            why = "no static busybox (Debian: busybox-static)";
            return std::nullopt;
        }
        return found;
    }

    /// Its initramfs: loads these modules, with what they need (a name without a file is built in), and runs `script` with
    /// busybox' shell, as the first process.
    void write_initramfs(const std::filesystem::path& to, const std::vector<std::string>& wanted, const std::string& script) const {
        initramfs made;
        for (const char* const each : {"bin", "dev", "proc", "sys", "mnt", "modules"})
            made.directory(each);
        made.file("bin/busybox", text_of(busybox), true);
        std::string init = "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nmount -t devtmpfs none /dev\n"
                           "mount -t proc none /proc\n";
        for (const std::filesystem::path& file : in_order(wanted)) {
            std::string name = file.filename().string();
            if (name.ends_with(".xz")) name.resize(name.size() - 3);
            made.file("modules/" + name, module_text(modules / file));
            init += "insmod /modules/" + name + "\n";
        }
        made.file("init", init + script, true);
        made.write(to);
    }

private:
    static std::string text_of(const std::filesystem::path& path) {
        std::ifstream file(path, std::ios::binary);
        return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    }
    /// Debian 13 compresses them.
    std::string module_text(const std::filesystem::path& path) const {
        if (path.extension() != ".xz") return text_of(path);
        std::string unpacked;
        std::FILE* const pipe = ::popen((busybox.string() + " xz -dc '" + path.string() + "'").c_str(), "r");
        char some[65536];
        while (pipe != nullptr) {
            const std::size_t got = std::fread(some, 1, sizeof some, pipe);
            if (got == 0) break;
            unpacked.append(some, got);
        }
        if (pipe == nullptr || ::pclose(pipe) != 0) throw std::runtime_error("cannot unpack " + path.string());
        return unpacked;
    }
    /// The files of modules, each behind those that it needs: modules.dep has a line "file: what it needs, outermost first".
    std::vector<std::filesystem::path> in_order(const std::vector<std::string>& wanted) const {
        std::map<std::string, std::vector<std::string>> lines; // by the module's name
        std::ifstream file(modules / "modules.dep");
        for (std::string line; std::getline(file, line);) {
            std::istringstream words(line);
            std::string first;
            words >> first;
            first.pop_back(); // the colon
            const std::string stem = std::filesystem::path(first).filename().string();
            std::vector<std::string>& needs = lines[stem.substr(0, stem.find('.'))];
            needs.assign(std::istream_iterator<std::string>(words), {});
            needs.insert(needs.begin(), first);
        }
        std::vector<std::filesystem::path> ordered;
        for (const std::string& name : wanted) {
            const auto found = lines.find(name);
            if (found == lines.end()) continue;
            for (auto needed = found->second.rbegin(); needed != found->second.rend(); ++needed) {
                bool there = false;
                for (const std::filesystem::path& one : ordered)
                    there = there || one == *needed;
                if (!there) ordered.emplace_back(*needed);
            }
        }
        return ordered;
    }
};

} // namespace vmstate::tests
