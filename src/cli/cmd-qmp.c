/* SPDX-License-Identifier: Apache-2.0 */
/* cairn qmp: one command of the control protocol. */
#include "base/alloc.h"
#include "base/json-text.h"
#include "base/keyval.h"
#include "base/macros.h"
#include "cli/cli.h"
#include "cli/session.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What is read from standard input at most, and how deep it may nest. */
#define INPUT_MAX ((size_t)16 << 20)

static json_t *value_of(const char *text);

/* The leaves of a tree that came from key=value become what they look like. */
static void convert_leaves(json_t *tree)
{
    const char *key;
    json_t *value;
    size_t i;

    json_object_foreach(tree, key, value)
    {
        if (json_is_string(value))
            json_object_set_new(tree, key, value_of(json_string_value(value)));
        else
            convert_leaves(value);
    }
    json_array_foreach(tree, i, value)
    {
        if (json_is_string(value))
            json_array_set_new(tree, i, value_of(json_string_value(value)));
        else
            convert_leaves(value);
    }
}

/* JSON where the text is JSON: a number, true, false, null, or what begins with one of {["; else a string. */
static json_t *value_of(const char *text)
{
    AUTO(error_free) struct error *ignored = NULL;
    json_t *value = NULL;

    if (text[0] && json_text_load(text, strlen(text), &value, &ignored) == 0)
        return value;
    value = json_string(text);
    return value ? value : json_string_lossy(text);
}

/* All of the words as one text of keyval's: in a value a comma is written twice. */
static int join_words(char **words, int count, char **ret, struct error **err)
{
    size_t size = 1;
    char *out;

    for (int i = 0; i < count; i++) {
        if (!strchr(words[i], '=') || words[i][0] == '=' || words[i][0] == '{')
            return cli_usage(err, "'%s': arguments are written as KEY=VALUE", words[i]);
        size += 2 * strlen(words[i]) + 1;
    }
    *ret = out = xnew_n(char, size);
    for (int i = 0; i < count; i++) {
        if (i > 0)
            *out++ = ',';
        for (const char *p = words[i]; *p; p++) {
            if (*p == ',')
                *out++ = ',';
            *out++ = *p;
        }
    }
    return 0;
}

static int arguments_of(char **words, int count, json_t **ret, struct error **err)
{
    AUTO(free_ptr) char *text = NULL;
    enum json_in_mode mode;
    int r;

    if (count == 0) {
        *ret = NULL;
        return 0;
    }
    r = join_words(words, count, &text, err);
    if (r == 0 && keyval_load(text, NULL, ret, &mode, err) < 0)
        r = CLI_WRONG_USAGE;
    if (r == 0)
        convert_leaves(*ret);
    return r;
}

static int read_input(char **ret, size_t *ret_len, struct error **err)
{
    char *text = xnew_n(char, INPUT_MAX + 1);

    *ret_len = fread(text, 1, INPUT_MAX + 1, stdin);
    *ret = text;
    if (ferror(stdin))
        return error_set(err, EIO, "cannot read standard input");
    if (*ret_len > INPUT_MAX)
        return error_set(err, E2BIG, "standard input has more than %zu MiB", INPUT_MAX >> 20);
    return 0;
}

/* {"execute": ..., "arguments": ...} */
static int command_of_input(json_t **ret_message, struct error **err)
{
    AUTO(free_ptr) char *text = NULL;
    const char *key;
    json_t *value;
    size_t len;
    int r = read_input(&text, &len, err);

    if (r == 0)
        r = json_text_load(text, len, ret_message, err);
    if (r < 0)
        return error_wrap(err, r, "standard input");
    if (!json_is_string(json_object_get(*ret_message, "execute")))
        return error_set(err, EINVAL,
                         "standard input: a command is {\"execute\": NAME, "
                         "\"arguments\": {...}}");
    json_object_foreach(*ret_message, key, value)
    {
        if (strcmp(key, "execute") != 0 && strcmp(key, "arguments") != 0 && strcmp(key, "id") != 0)
            return error_set(err, EINVAL, "standard input: member '%s' is not understood", key);
    }
    return 0;
}

static int send_and_print(const char *path, const char *name, json_t *arguments, bool json,
                          struct error **err)
{
    AUTO(session_close) struct cairn_client *c = NULL;
    struct cairn_error why = CAIRN_ERROR_INIT;
    json_t *value = NULL;
    int r = session_open(&c, path, err);

    if (r < 0)
        return r;
    r = cairn_client_command(c, name, arguments, -1, &value, &why);
    if (r < 0) {
        r = error_set(err, why.errnum, "%s: %s%s%s", name, why.class_name ? why.class_name : "",
                      why.class_name ? ": " : "", why.message);
        cairn_error_clear(&why);
        return r;
    }
    cli_print_json(value, !json);
    return 0;
}

static int qmp_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        CLI_HELP_OPTION,
        {"json", no_argument, NULL, 'j'},
        {NULL, 0, NULL, 0},
    };
    json_t *message = NULL;
    json_t *arguments = NULL;
    const char *name;
    bool json = false;
    int opt;
    int r;

    while ((opt = cli_next_option(argc, argv, options, err)) >= 0)
        json = true;
    r = opt == -1 ? cli_check_arguments(argc, 2, argc, "SOCKET and COMMAND", err) : opt;
    if (r < 0)
        return r;
    name = argv[optind + 1];
    if (strcmp(name, "-") == 0) {
        r = argc - optind > 2 ? cli_usage(err, "the arguments of a command from standard input "
                                               "stand there")
                              : command_of_input(&message, err);
        name = json_string_value(json_object_get(message, "execute"));
        arguments = json_incref(json_object_get(message, "arguments"));
    } else {
        r = arguments_of(argv + optind + 2, argc - optind - 2, &arguments, err);
    }
    if (r == 0)
        r = send_and_print(argv[optind], name, arguments, json, err);
    json_decref(arguments);
    json_decref(message);
    return r;
}

const struct cli_command qmp_command = {
    .name = "qmp",
    .summary = "send one command of the control protocol",
    .arguments = "SOCKET COMMAND [KEY=VALUE]... | SOCKET -",
    .help =
        "Sends a command to the control socket SOCKET and prints what it returns, as JSON. A dot in a KEY leads\n"
        "into an object (addr.type=unix), a number is a place in a list (bitmaps.0=b). A VALUE that is JSON is\n"
        "taken as that, anything else as a string: x=7 is a number, x='\"7\"' a string. With - the whole command\n"
        "is read from standard input: {\"execute\": COMMAND, \"arguments\": {...}}.\n"
        "\n"
        "      --json   on one line\n"
        "  -h, --help   say this and exit\n",
    .run = qmp_run,
};
