// libnvrtc.so on a machine without CUDA: kernels are compiled for the CPU by g++, as shared objects that driver.cc loads.
//
// With SIMULATED_GPU_NVRTC=FOLDER, of NVIDIA's wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime, whose lib/ and include/ lie there,
// NVIDIA's compiler has to take them too, for the device that is simulated (nvidia_compiler.py): what it refuses is refused, in its words.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>
#include <sstream>
#include <string>
#include <vector>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum { SUCCESS = 0, COMPILATION = 6 };

struct Program {
    std::string source, log, image;
};

// The end of what begins with the parenthesis at `from`, past its partner; text in quotes is skipped.
static size_t past_parenthesis(const std::string& text, size_t from) {
    int open = 0;
    bool quoted = false;
    for (size_t at = from; at < text.size(); at++) {
        if (text[at] == '"' && text[at - 1] != '\\') quoted = !quoted;
        if (quoted) continue;
        if (text[at] == '(') open++;
        if (text[at] == ')' && --open == 0) return at + 1;
    }
    return std::string::npos;
}

// `asm("cp.async.x [%0], ...;" : outputs : inputs : clobbers)` as a call of simulated.h's ptx_cp_async_x(outputs, inputs).
static std::string call_of(const std::string& body) {
    std::string instruction;
    std::vector<std::string> operands;
    size_t at = 0;
    auto skip_space = [&] { while (at < body.size() && isspace(body[at])) at++; };
    for (skip_space(); body[at] == '"'; skip_space()) {
        size_t end = body.find('"', at + 1);
        instruction += body.substr(at + 1, end - at - 1);
        at = end + 1;
    }
    for (int section = 0; at < body.size() && section < 2; section++) {
        at++;  // The colon.
        for (skip_space(); body[at] == '"'; skip_space()) {
            at = body.find('(', body.find('"', at + 1));
            size_t end = past_parenthesis(body, at);
            operands.push_back(body.substr(at, end - at));
            at = end;
            skip_space();
            if (body[at] == ',') at++;
        }
    }
    std::string name = instruction.substr(0, instruction.find_first_of(" ;"));
    for (char& letter : name) if (letter == '.') letter = '_';
    std::string call = "ptx_" + name + "(";
    for (size_t i = 0; i < operands.size(); i++) call += (i ? ", " : "") + operands[i];
    return call + ")";
}

static std::string for_the_cpu(std::string text) {
    static const std::regex assembly(R"(\basm\b(\s+volatile)?\s*\()"), shared(R"(extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[\];)"),
        kernel(R"re(extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\()re");
    std::smatch found;
    std::string rest = text, out;
    while (std::regex_search(rest, found, assembly)) {
        out += found.prefix();
        size_t open = found.position() + found.length() - 1, end = past_parenthesis(rest, open);
        out += call_of(rest.substr(open + 1, end - open - 2));
        rest = rest.substr(end);
    }
    text = std::regex_replace(out + rest, shared, "$1* const $2 = reinterpret_cast<$1*>(simulated.shared);");
    std::string entries;
    // Kernels that some macros leave out have no entry: a declaration that is not there cannot be named.
    for (std::sregex_iterator it(text.begin(), text.end(), kernel), end; it != end; ++it) entries += (*it)[1].str() + "\n";
    return text + "\n//ENTRIES\n" + entries;
}

static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

static std::string quoted(const std::string& word) { return "'" + word + "'"; }

EXPORT int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return SUCCESS;
}

EXPORT const char* nvrtcGetErrorString(int code) { return code == COMPILATION ? "compilation failed" : "an error"; }

EXPORT int nvrtcCreateProgram(Program** program, const char* source, const char*, int headers, const char**, const char**) {
    if (headers) return 3;
    *program = new Program{source, "", ""};
    return SUCCESS;
}

EXPORT int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

EXPORT int nvrtcCompileProgram(Program* program, int count, const char** options) {
    char folder[] = "/tmp/simulated-nvrtc-XXXXXX";
    if (!mkdtemp(folder)) return 2;
    std::string path = folder, command = "g++ -std=c++17 -O2 -march=native -fPIC -shared -fvisibility=hidden -fno-strict-aliasing -w -Wl,-Bsymbolic";
    for (int i = 0; i < count; i++) {
        std::string option = options[i];
        if (option.rfind("-D", 0) == 0) command += " " + quoted(option);
        else if (option.rfind("--include-path=", 0) == 0) command += " -I" + quoted(option.substr(15));
        else if (option.rfind("--gpu-architecture=", 0) && option.rfind("--std=", 0)) {
            program->log = "an option that is not simulated: " + option;
            return 5;
        }
    }
    std::string log = path + "/log", asked = "true";
    if (const char* real = getenv("SIMULATED_GPU_NVRTC")) {
        std::ofstream(path + "/kernels.cu") << program->source;
        asked = "env -u LD_LIBRARY_PATH python3 " + quoted(NVIDIA_COMPILER) + " " + quoted(real) + " " + path + "/kernels.cu";
        for (int i = 0; i < count; i++)
            if (strncmp(options[i], "--include-path=", 15)) asked += " " + quoted(options[i]);
    }
    int status = system((asked + " > " + log + " 2>&1").c_str());
    command += " -include simulated.h";
    std::string text = for_the_cpu(program->source);
    size_t split = text.find("\n//ENTRIES\n");
    // First the kernels that these macros leave, by the preprocessor's word.
    std::ofstream(path + "/kernels.cc") << text.substr(0, split);
    std::string plain = path + "/plain.cc";
    if (!status) status = system((command + " -E -P " + path + "/kernels.cc -o " + plain + " 2> " + log).c_str());
    if (!status) {
        std::string expanded = read(plain);
        std::ofstream file(path + "/kernels.cc", std::ios::app);
        std::istringstream names(text.substr(split + 11));
        for (std::string name; std::getline(names, name);)
            if (std::regex_search(expanded, std::regex("extern\\s+\"C\"\\s+void\\s+" + name + "\\s*\\("))) file << "\nSIMULATED_KERNEL(" << name << ")";
        file << "\n";
        file.close();
        status = system((command + " " + path + "/kernels.cc -o " + path + "/kernels.so 2> " + log).c_str());
    }
    program->log = read(log);
    program->image = read(path + "/kernels.so");
    if (!getenv("SIMULATED_GPU_KEEP")) (void)!system(("rm -rf " + path).c_str());
    return status ? COMPILATION : SUCCESS;
}

EXPORT int nvrtcGetProgramLogSize(Program* program, size_t* size) {
    *size = program->log.size() + 1;
    return SUCCESS;
}

EXPORT int nvrtcGetProgramLog(Program* program, char* log) {
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return SUCCESS;
}

EXPORT int nvrtcGetCUBINSize(Program* program, size_t* size) {
    *size = program->image.size();
    return SUCCESS;
}

EXPORT int nvrtcGetCUBIN(Program* program, char* image) {
    memcpy(image, program->image.data(), program->image.size());
    return SUCCESS;
}
