/* A libnvidia-ml.so.1 for machines without a GPU: answers from a scenario file what NVIDIA's library asks a driver.
 *
 * The file (FAKE_GPU_SCENARIO, else /etc/fake-gpu/scenario.ini) is read again at the first call after it changed, so a
 * running program sees "GPU 1 is lost" at once. Sections: [system], [gpu0] to [gpu63], [procnames], [events]. A value:
 *
 *     81559             the answer
 *     !GPU_IS_LOST      this NVML error (any name of the table below, or a number: a newer driver has codes of its own)
 *     delay:2.5 81559   the answer, 2.5 seconds later
 *     hang              no answer, ever, as from a hung driver: see hang()
 *
 * and a key that is not there is NOT_SUPPORTED. `[gpu1] state = !GPU_IS_LOST` fails every call on that GPU, while it is
 * still counted, as a lost one is. `[system] init = !DRIVER_NOT_LOADED` fails nvmlInit. `[system] loaded` is which
 * loading of the driver this is: where it changes, what was initialized is Uninitialized, as after a reload.
 *
 * Here is only what a client reads: nothing that changes a GPU. nvidia_smi.py beside this file reads the same keys.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SCENARIO "/etc/fake-gpu/scenario.ini"
#define MAX_GPUS 64
#define FIRST_HANDLE 0x1000 /* + index: a stale handle keeps meaning the same GPU, as with the real library */
#define NOT_AVAILABLE (~0ULL)

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    TIMEOUT = 10,
    VERSION_MISMATCH = 25,
    UNKNOWN = 999,
};

static const struct error {
    int code;
    const char *name, *text;
} errors[] = {
    {0, "SUCCESS", "Success"},
    {1, "UNINITIALIZED", "Uninitialized"},
    {2, "INVALID_ARGUMENT", "Invalid Argument"},
    {3, "NOT_SUPPORTED", "Not Supported"},
    {4, "NO_PERMISSION", "Insufficient Permissions"},
    {5, "ALREADY_INITIALIZED", "Already Initialized"},
    {6, "NOT_FOUND", "Not Found"},
    {7, "INSUFFICIENT_SIZE", "Insufficient Size"},
    {8, "INSUFFICIENT_POWER", "Insufficient External Power"},
    {9, "DRIVER_NOT_LOADED", "Driver Not Loaded"},
    {10, "TIMEOUT", "Timeout"},
    {11, "IRQ_ISSUE", "Interrupt Request Issue"},
    {12, "LIBRARY_NOT_FOUND", "NVML Shared Library Not Found"},
    {13, "FUNCTION_NOT_FOUND", "Function Not Found"},
    {14, "CORRUPTED_INFOROM", "Corrupted infoROM"},
    {15, "GPU_IS_LOST", "GPU is lost"},
    {16, "RESET_REQUIRED", "GPU requires reset"},
    {17, "OPERATING_SYSTEM", "GPU access blocked by the operating system"},
    {18, "LIB_RM_VERSION_MISMATCH", "Driver/library version mismatch"},
    {19, "IN_USE", "In use by another client"},
    {20, "MEMORY", "Insufficient Memory"},
    {21, "NO_DATA", "No data"},
    {22, "VGPU_ECC_NOT_SUPPORTED", "vGPU ECC not supported"},
    {23, "INSUFFICIENT_RESOURCES", "Insufficient Resources"},
    {24, "FREQ_NOT_SUPPORTED", "Invalid Frequency"},
    {25, "ARGUMENT_VERSION_MISMATCH", "Argument version mismatch"},
    {26, "DEPRECATED", "Requested functionality has been deprecated"},
    {27, "NOT_READY", "System is not in ready state"},
    {28, "GPU_NOT_FOUND", "No supported GPUs were found"},
    {29, "INVALID_STATE", "Resource not in correct state to perform requested operation"},
    {999, "UNKNOWN", "Unknown Error"},
};

/* ---- the scenario file ------------------------------------------------------------------------------------------ */

struct entry {
    const char *section, *key, *value; /* point into `text` */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* over everything in this block, and never held in a wait */
static struct stat seen;
static char *text;
static struct entry *entries;
static size_t count;

static char *trimmed(char *start, char *end)
{
    while (start < end && (*start == ' ' || *start == '\t'))
        start++;
    while (end > start && (end[-1] == ' ' || end[-1] == '\t' || end[-1] == '\r'))
        end--;
    *end = '\0';
    return start;
}

/* Splits `text` in place. Grows by one entry a line, which is enough for every line to be one. */
static void parse(void)
{
    const char *section = "";
    size_t lines = 1;
    for (const char *c = text; *c; c++)
        lines += *c == '\n';
    free(entries);
    entries = calloc(lines, sizeof *entries);
    count = 0;
    if (!entries)
        return;
    for (char *line = text, *next; line; line = next) {
        char *end = strchr(line, '\n'), *equals;
        next = end ? end + 1 : NULL;
        if (!end)
            end = line + strlen(line);
        *end = '\0';
        line = trimmed(line, end);
        if (*line == '[' && strchr(line, ']')) {
            section = line + 1;
            *strchr(line, ']') = '\0';
        } else if (*line != '#' && *line != ';' && (equals = strchr(line, '='))) {
            char *value = trimmed(equals + 1, line + strlen(line));
            entries[count++] = (struct entry){section, trimmed(line, equals), value};
        }
    }
}

static int is_same(const struct stat *a, const struct stat *b)
{
    return a->st_ino == b->st_ino && a->st_size == b->st_size && a->st_mtim.tv_sec == b->st_mtim.tv_sec &&
           a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

/* Writers rename a whole file into place, so that what is read here is one scenario and never half of one. */
static void reread(void)
{
    const char *path = getenv("FAKE_GPU_SCENARIO");
    FILE *file = fopen(path ? path : SCENARIO, "re");
    struct stat now;
    if (!file) {
        count = 0; /* nothing is known: no GPU, every value NOT_SUPPORTED */
        memset(&seen, 0, sizeof seen);
        return;
    }
    if (fstat(fileno(file), &now) == 0 && !is_same(&now, &seen)) {
        free(text);
        text = calloc(1, (size_t)now.st_size + 1);
        if (text && fread(text, 1, (size_t)now.st_size, file) == (size_t)now.st_size) {
            parse();
            seen = now;
        } else {
            count = 0;
        }
    }
    fclose(file);
}

/* Copies the raw value; 0 when there is no such key. */
static int find(const char *section, const char *key, char *value, size_t size)
{
    int found = 0;
    pthread_mutex_lock(&lock);
    reread();
    for (size_t i = 0; i < count && !found; i++) {
        if (strcmp(entries[i].section, section) == 0 && strcmp(entries[i].key, key) == 0) {
            snprintf(value, size, "%s", entries[i].value);
            found = 1;
        }
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static int has_section(const char *section)
{
    int found = 0;
    pthread_mutex_lock(&lock);
    reread();
    for (size_t i = 0; i < count && !found; i++)
        found = strcmp(entries[i].section, section) == 0;
    pthread_mutex_unlock(&lock);
    return found;
}

/* State D, deaf to SIGTERM, gone with SIGKILL: the parent of a vfork sleeps until its child has left its memory, and
 * this child never leaves. What a hung driver does is worse: there SIGKILL does nothing either. */
static void hang(void)
{
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    pid_t parent = getpid();
    for (;;) {
        if (vfork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent) /* killed before we could ask to be told */
                _exit(0);
            for (;;)
                pause();
        }
    }
}

static void wait_s(double seconds)
{
    struct timespec left = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    while (nanosleep(&left, &left) == -1 && errno == EINTR)
        ;
}

static int code_of(const char *name)
{
    char *end;
    long number = strtol(name, &end, 10);
    if (end != name && !*end)
        return (int)number;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (strcmp(errors[i].name, name) == 0)
            return errors[i].code;
    return UNKNOWN;
}

/* The answer to one question: the value, or the error, the delay or the silence that stands in its place. */
static int answer(const char *section, const char *key, char *value, size_t size)
{
    if (!find(section, key, value, size))
        return NOT_SUPPORTED;
    if (strncmp(value, "delay:", 6) == 0) {
        char *rest;
        wait_s(strtod(value + 6, &rest));
        while (*rest == ' ')
            rest++;
        memmove(value, rest, strlen(rest) + 1);
    }
    if (strcmp(value, "hang") == 0)
        hang();
    return value[0] == '!' ? code_of(value + 1) : SUCCESS;
}

/* ---- library and system ----------------------------------------------------------------------------------------- */

static unsigned users; /* under `lock`: how many nvmlInit are not yet shut down */
static char loaded[64]; /* under `lock`: which loading of the driver they speak with */

static int is_initialized(void)
{
    char now[sizeof loaded] = "";
    find("system", "loaded", now, sizeof now);
    pthread_mutex_lock(&lock);
    if (strcmp(now, loaded) != 0)
        users = 0;
    int yes = users > 0;
    pthread_mutex_unlock(&lock);
    return yes;
}

int nvmlInitWithFlags(unsigned flags)
{
    char value[64];
    int rc = answer("system", "init", value, sizeof value);
    (void)flags;
    if (rc != SUCCESS && rc != NOT_SUPPORTED) /* not there: nothing stands in the way */
        return rc;
    is_initialized(); /* forgets who spoke with a driver that is not loaded any more */
    *value = '\0';
    find("system", "loaded", value, sizeof value);
    pthread_mutex_lock(&lock);
    strcpy(loaded, value);
    users++;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int nvmlInit_v2(void)
{
    return nvmlInitWithFlags(0);
}

int nvmlInit(void)
{
    return nvmlInitWithFlags(0);
}

int nvmlShutdown(void)
{
    int rc = UNINITIALIZED;
    pthread_mutex_lock(&lock);
    if (users > 0) {
        users--;
        rc = SUCCESS;
    }
    pthread_mutex_unlock(&lock);
    return rc;
}

const char *nvmlErrorString(int code)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code)
            return errors[i].text;
    return "Unknown Error";
}

static int copy_text(const char *value, char *out, unsigned length)
{
    if (!out || strlen(value) >= length)
        return out ? INSUFFICIENT_SIZE : INVALID_ARGUMENT;
    strcpy(out, value);
    return SUCCESS;
}

static int system_text(const char *section, const char *key, char *out, unsigned length)
{
    char value[1024];
    int rc = answer(section, key, value, sizeof value);
    return rc == SUCCESS ? copy_text(value, out, length) : rc;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    return is_initialized() ? system_text("system", "driver_version", version, length) : UNINITIALIZED;
}

/* The one question that the library answers by itself, without a driver and before nvmlInit. */
int nvmlSystemGetNVMLVersion(char *version, unsigned length)
{
    return system_text("system", "nvml_version", version, length);
}

int nvmlSystemGetCudaDriverVersion(int *version)
{
    char value[64];
    int rc = is_initialized() ? answer("system", "cuda_driver_version", value, sizeof value) : UNINITIALIZED;
    if (rc == SUCCESS)
        *version = atoi(value);
    return rc;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    return nvmlSystemGetCudaDriverVersion(version);
}

int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length)
{
    char key[16];
    int rc;
    snprintf(key, sizeof key, "%u", pid);
    rc = is_initialized() ? system_text("procnames", key, name, length) : UNINITIALIZED;
    return rc == NOT_SUPPORTED ? NOT_FOUND : rc;
}

/* ---- devices ---------------------------------------------------------------------------------------------------- */

typedef void *device;

static unsigned gpu_count(void)
{
    char section[16];
    unsigned n = 0;
    for (; n < MAX_GPUS; n++) {
        snprintf(section, sizeof section, "gpu%u", n);
        if (!has_section(section))
            break;
    }
    return n;
}

/* Whether the GPU answers at all; `section` is where its values stand. */
static int reach(unsigned long index, char *section, size_t size)
{
    char value[256];
    int rc;
    if (!is_initialized())
        return UNINITIALIZED;
    if (index >= gpu_count())
        return INVALID_ARGUMENT;
    snprintf(section, size, "gpu%lu", index);
    rc = answer(section, "state", value, sizeof value);
    return rc == NOT_SUPPORTED ? SUCCESS : rc;
}

static int device_answer(device handle, const char *key, char *value, size_t size)
{
    char section[16];
    int rc = reach((unsigned long)handle - FIRST_HANDLE, section, sizeof section);
    return rc == SUCCESS ? answer(section, key, value, size) : rc;
}

static int device_text(device handle, const char *key, char *out, unsigned length)
{
    char value[1024];
    int rc = device_answer(handle, key, value, sizeof value);
    return rc == SUCCESS ? copy_text(value, out, length) : rc;
}

static int device_number(device handle, const char *key, unsigned long long *out)
{
    char value[256];
    int rc = device_answer(handle, key, value, sizeof value);
    if (rc == SUCCESS)
        *out = strtoull(value, NULL, 0);
    return rc;
}

static int device_unsigned(device handle, const char *key, unsigned *out)
{
    unsigned long long number;
    int rc = device_number(handle, key, &number);
    if (rc == SUCCESS)
        *out = (unsigned)number;
    return rc;
}

int nvmlDeviceGetCount_v2(unsigned *n)
{
    char value[64];
    int rc = is_initialized() ? answer("system", "count", value, sizeof value) : UNINITIALIZED;
    if (rc == NOT_SUPPORTED)
        *n = gpu_count();
    else if (rc == SUCCESS)
        *n = (unsigned)atoi(value);
    return rc == NOT_SUPPORTED ? SUCCESS : rc;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *handle)
{
    char section[16];
    int rc = reach(index, section, sizeof section);
    if (rc == SUCCESS)
        *handle = (device)(FIRST_HANDLE + (unsigned long)index);
    return rc;
}

/* A GPU that does not answer is not found by what it is called: its name cannot be read. */
static int find_device(const char *key, const char *wanted, device *handle)
{
    char value[256];
    if (!is_initialized())
        return UNINITIALIZED;
    for (unsigned index = 0, n = gpu_count(); index < n; index++) {
        device candidate = (device)(FIRST_HANDLE + (unsigned long)index);
        if (device_answer(candidate, key, value, sizeof value) == SUCCESS && strcasecmp(value, wanted) == 0) {
            *handle = candidate;
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device *handle)
{
    return find_device("uuid", uuid, handle);
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, device *handle)
{
    return find_device("pci_bus_id", bus_id, handle);
}

int nvmlDeviceGetIndex(device handle, unsigned *index)
{
    char section[16];
    int rc = reach((unsigned long)handle - FIRST_HANDLE, section, sizeof section);
    if (rc == SUCCESS)
        *index = (unsigned)((unsigned long)handle - FIRST_HANDLE);
    return rc;
}

#define DEVICE_TEXT(function, key)                                                                  \
    int function(device handle, char *out, unsigned length)                                         \
    {                                                                                               \
        return device_text(handle, key, out, length);                                               \
    }
#define DEVICE_UNSIGNED(function, key)                                                              \
    int function(device handle, unsigned *out)                                                      \
    {                                                                                               \
        return device_unsigned(handle, key, out);                                                   \
    }
#define DEVICE_NUMBER(function, key)                                                                \
    int function(device handle, unsigned long long *out)                                            \
    {                                                                                               \
        return device_number(handle, key, out);                                                     \
    }
#define DEVICE_PAIR(function, first_key, second_key)                                                \
    int function(device handle, unsigned *first, unsigned *second)                                  \
    {                                                                                               \
        int rc = device_unsigned(handle, first_key, first);                                         \
        return rc == SUCCESS ? device_unsigned(handle, second_key, second) : rc;                    \
    }

DEVICE_TEXT(nvmlDeviceGetName, "name")
DEVICE_TEXT(nvmlDeviceGetUUID, "uuid")
DEVICE_TEXT(nvmlDeviceGetSerial, "serial")
DEVICE_TEXT(nvmlDeviceGetVbiosVersion, "vbios_version")
DEVICE_UNSIGNED(nvmlDeviceGetMinorNumber, "minor_number")
DEVICE_UNSIGNED(nvmlDeviceGetPowerUsage, "power_draw_mw")
DEVICE_UNSIGNED(nvmlDeviceGetEnforcedPowerLimit, "enforced_power_limit_mw")
DEVICE_UNSIGNED(nvmlDeviceGetPowerManagementLimit, "power_limit_mw")
DEVICE_UNSIGNED(nvmlDeviceGetPowerManagementDefaultLimit, "power_default_limit_mw")
DEVICE_NUMBER(nvmlDeviceGetTotalEnergyConsumption, "energy_mj")
DEVICE_UNSIGNED(nvmlDeviceGetFanSpeed, "fan_speed")
DEVICE_UNSIGNED(nvmlDeviceGetPersistenceMode, "persistence_mode")
DEVICE_UNSIGNED(nvmlDeviceGetPerformanceState, "pstate")
DEVICE_UNSIGNED(nvmlDeviceGetComputeMode, "compute_mode")
DEVICE_NUMBER(nvmlDeviceGetCurrentClocksThrottleReasons, "clocks_event_reasons")
DEVICE_NUMBER(nvmlDeviceGetCurrentClocksEventReasons, "clocks_event_reasons")
DEVICE_PAIR(nvmlDeviceGetEccMode, "ecc_mode_current", "ecc_mode_pending")
DEVICE_PAIR(nvmlDeviceGetMigMode, "mig_mode_current", "mig_mode_pending")
DEVICE_UNSIGNED(nvmlDeviceGetMaxMigDeviceCount, "mig_max_devices")
DEVICE_UNSIGNED(nvmlDeviceGetRetiredPagesPendingStatus, "retired_pages_pending")
DEVICE_NUMBER(nvmlDeviceGetSupportedEventTypes, "supported_event_types")

struct utilization {
    unsigned gpu, memory;
};

int nvmlDeviceGetUtilizationRates(device handle, struct utilization *out)
{
    int rc = device_unsigned(handle, "utilization_gpu", &out->gpu);
    return rc == SUCCESS ? device_unsigned(handle, "utilization_memory", &out->memory) : rc;
}

int nvmlDeviceGetTemperature(device handle, unsigned sensor, unsigned *out)
{
    return sensor == 0 ? device_unsigned(handle, "temperature_gpu", out) : INVALID_ARGUMENT;
}

static int clock_of(device handle, const char *prefix, unsigned type, unsigned *out)
{
    static const char *const names[] = {"graphics", "sm", "mem", "video"};
    char key[64];
    if (type >= sizeof names / sizeof *names)
        return INVALID_ARGUMENT;
    snprintf(key, sizeof key, "%s_%s", prefix, names[type]);
    return device_unsigned(handle, key, out);
}

int nvmlDeviceGetClockInfo(device handle, unsigned type, unsigned *out)
{
    return clock_of(handle, "clocks_current", type, out);
}

int nvmlDeviceGetMaxClockInfo(device handle, unsigned type, unsigned *out)
{
    return clock_of(handle, "clocks_max", type, out);
}

struct pci {
    char legacy_id[16];
    unsigned domain, bus, device, device_id, sub_system_id;
    char bus_id[32];
};

int nvmlDeviceGetPciInfo_v3(device handle, struct pci *out)
{
    struct pci pci = {0};
    int rc = device_text(handle, "pci_bus_id", pci.bus_id, sizeof pci.bus_id);
    if (rc == SUCCESS && sscanf(pci.bus_id, "%x:%x:%x", &pci.domain, &pci.bus, &pci.device) != 3)
        rc = UNKNOWN;
    if (rc == SUCCESS)
        rc = device_unsigned(handle, "pci_device_id", &pci.device_id);
    if (rc == SUCCESS)
        rc = device_unsigned(handle, "pci_sub_device_id", &pci.sub_system_id);
    if (rc != SUCCESS)
        return rc;
    snprintf(pci.legacy_id, sizeof pci.legacy_id, "%04X:%02X:%02X.0", pci.domain & 0xffff, pci.bus & 0xff,
             pci.device & 0xff);
    *out = pci;
    return SUCCESS;
}

struct memory {
    unsigned long long total, free, used;
};

struct memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

static int read_memory(device handle, struct memory_v2 *out)
{
    int rc = device_number(handle, "memory_total", &out->total);
    if (rc == SUCCESS)
        rc = device_number(handle, "memory_reserved", &out->reserved);
    if (rc == SUCCESS)
        rc = device_number(handle, "memory_used", &out->used);
    if (rc == SUCCESS)
        out->free = out->total - out->reserved - out->used;
    return rc;
}

int nvmlDeviceGetMemoryInfo(device handle, struct memory *out)
{
    struct memory_v2 memory;
    int rc = read_memory(handle, &memory);
    if (rc == SUCCESS) /* the first version counts the reserved part as used; the second does not */
        *out = (struct memory){memory.total, memory.free, memory.used + memory.reserved};
    return rc;
}

int nvmlDeviceGetMemoryInfo_v2(device handle, struct memory_v2 *out)
{
    if (out->version != (sizeof *out | 2U << 24))
        return VERSION_MISMATCH;
    return read_memory(handle, out);
}

int nvmlDeviceGetTotalEccErrors(device handle, unsigned type, unsigned counter, unsigned long long *out)
{
    char key[64];
    if (type > 1 || counter > 1)
        return INVALID_ARGUMENT;
    snprintf(key, sizeof key, "ecc_%s_%s", type == 0 ? "corrected" : "uncorrected",
             counter == 0 ? "volatile" : "aggregate");
    return device_number(handle, key, out);
}

/* `remapped_rows = correctable uncorrectable pending failure` */
int nvmlDeviceGetRemappedRows(device handle, unsigned *correctable, unsigned *uncorrectable, unsigned *pending,
                              unsigned *failure)
{
    char value[256];
    int rc = device_answer(handle, "remapped_rows", value, sizeof value);
    if (rc == SUCCESS && sscanf(value, "%u %u %u %u", correctable, uncorrectable, pending, failure) != 4)
        rc = UNKNOWN;
    return rc;
}

struct fabric {
    unsigned char cluster[16];
    int status;
    unsigned clique;
    unsigned char state;
};

/* `fabric_state`: 1 not started, 2 in progress, 3 completed, and then `fabric_status`, an NVML error or its absence. */
int nvmlDeviceGetGpuFabricInfo(device handle, struct fabric *out)
{
    unsigned state;
    char value[64];
    int rc = device_unsigned(handle, "fabric_state", &state);
    if (rc != SUCCESS)
        return rc;
    rc = device_answer(handle, "fabric_status", value, sizeof value);
    *out = (struct fabric){.status = rc == NOT_SUPPORTED ? SUCCESS : rc, .state = (unsigned char)state};
    return SUCCESS;
}

/* `retired_pages_single_bit = ADDRESS ADDRESS…`; a caller asks with room for none first, to learn how many there are. */
int nvmlDeviceGetRetiredPages(device handle, unsigned cause, unsigned *n, unsigned long long *addresses)
{
    char value[1024], *saved, *word;
    unsigned found = 0, room = *n;
    const char *key = cause == 0 ? "retired_pages_single_bit" : "retired_pages_double_bit";
    int rc = device_answer(handle, key, value, sizeof value);
    if (rc != SUCCESS)
        return rc;
    for (word = strtok_r(value, " ", &saved); word; word = strtok_r(NULL, " ", &saved), found++)
        if (addresses && found < room)
            addresses[found] = strtoull(word, NULL, 0);
    *n = found;
    return found > room || (found && !addresses) ? INSUFFICIENT_SIZE : SUCCESS;
}

/* ---- processes: `compute_processes = PID:BYTES PID:?…`, `?` for a size that the driver does not know -------------- */

struct process {
    unsigned pid;
    unsigned long long used_bytes;
    unsigned gpu_instance, compute_instance;
#ifdef WIDE_PROCESSES /* early 535: eight bytes more under the same name, which a client that reads 24 takes for a pid */
    unsigned long long protected_bytes;
#endif
};

static int read_processes(device handle, const char *key, unsigned *n, struct process *out)
{
    char value[1024], *saved, *word;
    unsigned found = 0, room = *n;
    int rc = device_answer(handle, key, value, sizeof value);
    if (rc != SUCCESS)
        return rc;
    for (word = strtok_r(value, " ", &saved); word; word = strtok_r(NULL, " ", &saved), found++) {
        char *bytes = strchr(word, ':');
        if (!out || found >= room)
            continue;
        out[found] = (struct process){
            .pid = (unsigned)strtoul(word, NULL, 10),
            .used_bytes = bytes && bytes[1] != '?' ? strtoull(bytes + 1, NULL, 0) : NOT_AVAILABLE,
            .gpu_instance = ~0U,
            .compute_instance = ~0U,
#ifdef WIDE_PROCESSES
            .protected_bytes = NOT_AVAILABLE,
#endif
        };
    }
    *n = found;
    return found > room || (found && !out) ? INSUFFICIENT_SIZE : SUCCESS;
}

#define DEVICE_PROCESSES(function, key)                                                             \
    int function(device handle, unsigned *n, struct process *out)                                   \
    {                                                                                               \
        return read_processes(handle, key, n, out);                                                 \
    }

DEVICE_PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, "compute_processes")
DEVICE_PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "compute_processes")
DEVICE_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics_processes")
DEVICE_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics_processes")
DEVICE_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2, "mps_processes")
DEVICE_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, "mps_processes")

/* ---- events: each step of `[events] seq` delivers `last = GPU:TYPE:DATA` once to every set that asked for its type - */

struct event_set {
    unsigned long long types[MAX_GPUS];
    unsigned long long delivered;
};

struct event {
    device device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
};

static unsigned long long event_number(void)
{
    char value[64];
    return answer("events", "seq", value, sizeof value) == SUCCESS ? strtoull(value, NULL, 0) : 0;
}

int nvmlEventSetCreate(struct event_set **out)
{
    if (!is_initialized())
        return UNINITIALIZED;
    *out = calloc(1, sizeof **out);
    if (!*out)
        return UNKNOWN;
    (*out)->delivered = event_number(); /* what happened before is not told */
    return SUCCESS;
}

int nvmlEventSetFree(struct event_set *set)
{
    free(set);
    return SUCCESS;
}

int nvmlDeviceRegisterEvents(device handle, unsigned long long types, struct event_set *set)
{
    unsigned index;
    int rc = nvmlDeviceGetIndex(handle, &index);
    if (rc == SUCCESS)
        set->types[index] |= types;
    return rc;
}

static int has_event(struct event_set *set, struct event *out)
{
    char value[256];
    unsigned gpu;
    unsigned long long number = event_number(), type, data;
    if (number == set->delivered || answer("events", "last", value, sizeof value) != SUCCESS)
        return 0;
    set->delivered = number;
    if (sscanf(value, "%u:%llu:%llu", &gpu, &type, &data) != 3 || gpu >= MAX_GPUS || !(set->types[gpu] & type))
        return 0;
    *out = (struct event){(device)(FIRST_HANDLE + (unsigned long)gpu), type, data, ~0U, ~0U};
    return 1;
}

int nvmlEventSetWait_v2(struct event_set *set, struct event *out, unsigned timeout_ms)
{
    struct timespec now, end;
    if (!is_initialized())
        return UNINITIALIZED;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += timeout_ms / 1000;
    end.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    for (;;) {
        if (has_event(set, out))
            return SUCCESS;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if ((double)(now.tv_sec - end.tv_sec) + (double)(now.tv_nsec - end.tv_nsec) / 1e9 >= 0)
            return TIMEOUT;
        wait_s(0.01);
    }
}
