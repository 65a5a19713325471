#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the text of cairnd's --help about options that the schema describes, as a C header.

usage: schema-help.py OUT FRAGMENT...
"""
import os
import sys
import textwrap

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import schema  # noqa: E402

# Option, type of its value, the key that may be left out for the first item.
OPTIONS = (
    ('--blockdev', 'node-options', 'driver'),
    ('--export', 'export-options', 'type'),
    ('--nbd-server', 'nbd-server-options', None),
    ('--chardev', 'chardev-options', 'backend'),
    ('--monitor', 'monitor-options', 'chardev'),
    ('--object', 'object-options', 'qom-type'),
)
KEY_COLUMN = 6
TEXT_COLUMN = 32
WIDTH = 100


def value_text(m):
    """What stands behind `key=`."""
    t = m.type
    if isinstance(t, schema.Enum):
        return '|'.join(t.values)
    if t.name == 'bool':
        return 'on|off'
    if isinstance(t, schema.Alternate):
        return 'NODE'
    return {'string': 'TEXT', 'size': 'SIZE'}.get(t.name, 'NUMBER')


def note(m):
    if m.default is not None:
        default = ('off', 'on')[m.default] if isinstance(m.default, bool) else m.default
        return ' Default: %s.' % default
    return '' if m.optional else ' Mandatory.'


def entry(key, text):
    """The key, then the text beside it, or below when the key is long."""
    lines = textwrap.wrap(' '.join(text.split()), WIDTH - TEXT_COLUMN)
    head = ' ' * KEY_COLUMN + key
    if len(head) + 2 > TEXT_COLUMN:
        out = [head]
    else:
        out = [head.ljust(TEXT_COLUMN) + lines.pop(0)]
    return out + [' ' * TEXT_COLUMN + line for line in lines]


def members(type_, prefix, implied=None):
    lines = []
    for m in type_.members:
        key = prefix + m.name
        if isinstance(m.type, (schema.Struct, schema.Union)):
            lines += members(m.type, key + '.')
            continue
        text = m.doc + note(m)
        if isinstance(m.type, schema.Alternate):
            text += ' Or its definition: %s.driver=...' % key
        shown = '[%s=]' % key if m.name == implied and not prefix else key + '='
        lines += entry(shown + value_text(m), text)
    return lines + variants(type_, prefix)


def variants(type_, prefix):
    """What each value of a union's tag adds; values that add the same stand together."""
    if not isinstance(type_, schema.Union):
        return []
    groups = {}
    for value, variant in type_.variants.items():
        groups.setdefault(variant.name, (variant, []))[1].append(value)
    lines = []
    for variant, values in groups.values():
        lines.append('    with %s%s=%s:' % (prefix, type_.tag.name, '|'.join(values)))
        lines += members(variant, prefix)
    return lines


def help_lines(fragments):
    described = schema.Schema(fragments)
    lines = []
    for option, type_name, implied in OPTIONS:
        lines.append('  %s KEY=VALUE,...' % option)
        lines += members(described.types[type_name], '', implied) + ['']
    return lines


def main():
    out, fragments = sys.argv[1], sys.argv[2:]
    with open(out, 'w', encoding='utf-8') as f:
        f.write('/* SPDX-License-Identifier: Apache-2.0 */\n')
        f.write("/* Made by tools/schema-help.py from the schema's fragments: edit those. */\n")
        f.write('static const char option_help[] =\n')
        f.write('\n'.join('    ' + schema.c_string(line)[:-1] + '\\n"' for line in help_lines(fragments)) + ';\n')


if __name__ == '__main__':
    try:
        main()
    except schema.SchemaError as e:
        sys.exit('schema-help.py: %s' % e)
