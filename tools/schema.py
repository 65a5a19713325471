#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Generate C, introspection data and the reference manual from the schema's TOML fragments.

usage: schema.py --prefix NAME --out DIR FRAGMENT...

A fragment holds tables of these kinds; names are words joined by '-', in C by '_':

  [enum.NAME]       doc, values = {value = "doc"}, refused = {value = "why"}
  [struct.NAME]     doc, members, refused = {member = "why"}
  [union.NAME]      doc, members, tag = "member", variants = {value = "struct"} or "drivers", refused
  [alternate.NAME]  doc, members: one for each JSON type that is taken
  [command.NAME]    doc, since, arguments = members or the name of a struct or union, returns = type
  [event.NAME]      doc, since, data = members
  [protocol.NAME]   a driver (also format, filter): doc, since, options = members, refused; options = "DRIVER" shares
                    another driver's

  a member          {type, doc, optional, default, min, max, unit, identifier, features}
  type              bool int u8 u16 u32 u64 size number string null any, the name of a type, or [element type]

Written to DIR (P is the prefix):

  P-shared.h        C types of the fragments that hold no driver
  D-options.h       struct D_options for each driver D, and the types of its fragment
  P-types.[ch]      all types, those included that hold drivers' options; descriptors; commands, drivers, events
  P-dispatch.[ch]   the handlers' prototypes and the table that calls them
  P-introspect.c    what query-qmp-schema answers, as JSON text
  P-reference.md    the manual
"""
import argparse
import json
import os
import re
import sys
import tomllib

UINT_MAX = {'u8': 2**8 - 1, 'u16': 2**16 - 1, 'u32': 2**32 - 1, 'u64': 2**64 - 1, 'size': 2**64 - 1}
STRING_MAX = 4095
ARRAY_MAX = 4096
DRIVER_KINDS = ('protocol', 'format', 'filter')

# Words that cannot be a member's name in C; gnu17 predefines the last two as macros.
RESERVED = set('''auto bool break case char const continue default do double else enum extern float for goto if inline int
    long register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
    unix linux'''.split())

KEYS = {
    'enum': {'doc', 'values', 'refused'},
    'struct': {'doc', 'members', 'refused', 'features'},
    'union': {'doc', 'members', 'tag', 'variants', 'refused', 'features'},
    'alternate': {'doc', 'members'},
    'command': {'doc', 'since', 'arguments', 'returns', 'features', 'ours'},
    'event': {'doc', 'since', 'data', 'ours'},
    'driver': {'doc', 'since', 'options', 'refused', 'features'},
    'member': {'type', 'doc', 'optional', 'default', 'min', 'max', 'unit', 'identifier', 'features', 'ours'},
}

HEAD = '''/* SPDX-License-Identifier: Apache-2.0 */
/* Made by tools/schema.py from the schema's fragments: edit those. */
'''


class SchemaError(Exception):
    pass


def c_name(name):
    name = re.sub(r'[-.]', '_', name)
    return name + '_' if name in RESERVED else name


def c_upper(name):
    return re.sub(r'[-.]', '_', name).upper()


def c_string(text):
    return '"' + text.replace('\\', '\\\\').replace('"', '\\"') + '"'


def file_name(name):
    return name.replace('_', '-')


# Types. Each knows its name in C, how its descriptor is called, and which types must be complete before it.


class Builtin:
    """bool, integers, strings and the like: nothing is generated for them but uses."""

    C = {'bool': 'bool ', 'int': 'int64_t ', 'number': 'double ', 'string': 'char *', 'any': 'json_t *'}
    JSON = {'bool': 'boolean', 'number': 'number', 'string': 'string', 'null': 'null', 'any': 'value'}
    WIRE = {'bool': 'bool', 'number': 'number', 'string': 'str', 'null': 'null', 'any': 'any'}

    def __init__(self, name):
        self.name = name
        self.integer = name == 'int' or name in UINT_MAX
        self.c = self.C.get(name, 'uint64_t ')
        base = 'uint' if name in UINT_MAX and name != 'size' else name
        self.descriptor = 'schema_' + base
        self.array_name = base
        self.json = self.JSON.get(name, 'integer')
        self.wire = self.WIRE.get(name, 'int')
        self.has_null = name in ('string', 'any')
        self.aggregate = False

    def complete_first(self):
        return []


class Named:
    """A type that a fragment defines."""

    aggregate = True
    has_null = False
    integer = False
    json = 'object'

    def __init__(self, name, table, home):
        self.name = name
        self.home = home  # the driver whose fragment defines it, or None
        self.doc = table.get('doc', '')
        self.c = 'struct %s ' % c_name(name)
        self.descriptor = c_name(name) + '_type'
        self.array_name = c_name(name)
        self.refused = table.get('refused', {})
        self.features = table.get('features', [])
        self.members = []

    def complete_first(self):
        return [m.type for m in self.members if not m.indirect]


class Enum(Named):
    aggregate = False
    json = 'string'

    def __init__(self, name, values, table, home):
        super().__init__(name, table, home)
        self.values = values
        self.c = 'enum %s ' % c_name(name)

    def constant(self, value):
        return '%s_%s' % (c_upper(self.name), c_upper(value))


class Struct(Named):
    pass


class Union(Named):
    def __init__(self, name, table, home):
        super().__init__(name, table, home)
        self.tag = None
        self.variants = {}

    def complete_first(self):
        return super().complete_first() + [t for t in self.variants.values() if t]


class Alternate(Named):
    json = 'several'


class Array:
    aggregate = True
    has_null = False
    integer = False
    json = 'array'

    def __init__(self, element):
        self.element = element
        self.name = '[%s]' % element.name
        self.home = getattr(element, 'home', None)
        self.c = 'struct %s_array ' % element.array_name
        self.descriptor = element.array_name + '_array_type'
        if isinstance(element, Builtin) and element.name in ('u8', 'u16', 'u32'):
            raise SchemaError('arrays of %s are not supported: use u64' % element.name)

    def complete_first(self):
        return [self.element] if isinstance(self.element, Enum) else []


class Member:
    def __init__(self, name, table, type_, where):
        self.name = name
        self.type = type_
        self.c = c_name(name)
        self.doc = table['doc']
        self.ours = table.get('ours', False)
        self.features = table.get('features', [])
        self.optional = table.get('optional', False)
        self.default = table.get('default')
        self.unit = table.get('unit')
        self.identifier = table.get('identifier', False)
        if self.optional and self.default is not None:
            raise SchemaError('%s: optional and default together' % where)
        self.indirect = self.optional and isinstance(type_, (Struct, Union, Alternate))
        self.flag = self.optional and not self.indirect and not type_.has_null
        self.set_limits(table, where)
        self.check_default(where)

    def set_limits(self, table, where):
        t = self.type
        low, high = 0, 0
        if t.integer:
            low = -2**63 if t.name == 'int' else 0
            high = 2**63 - 1 if t.name == 'int' else UINT_MAX[t.name]
        elif isinstance(t, Array):
            high = ARRAY_MAX
        elif t.name == 'string':
            high = STRING_MAX
        elif {'min', 'max', 'unit'} & set(table):
            raise SchemaError('%s: %s has no limits' % (where, t.name))
        self.min = table.get('min', low)
        self.max = table.get('max', high)
        if not low <= self.min <= self.max:
            raise SchemaError('%s: the limits are not in order' % where)
        if t.integer and self.max > high:
            raise SchemaError('%s: max does not fit %s' % (where, t.name))
        if self.identifier and t.name != 'string':
            raise SchemaError('%s: only a string is an identifier' % where)

    def check_default(self, where):
        t, d = self.type, self.default
        if d is None:
            return
        good = (t.name == 'bool' and isinstance(d, bool)
                or t.integer and isinstance(d, int) and not isinstance(d, bool) and self.min <= d <= self.max
                or t.name == 'string' and isinstance(d, str) and self.min <= len(d.encode()) <= self.max
                or isinstance(t, Enum) and d in t.values
                or isinstance(t, Array) and d == []
                or isinstance(t, Struct) and d == {})
        if not good:
            raise SchemaError('%s: %r is no default for %s' % (where, d, t.name))
        if isinstance(t, Struct) and any(not m.optional and m.default is None for m in t.members):
            raise SchemaError('%s: default {} lacks mandatory members of %s' % (where, t.name))


class Command:
    def __init__(self, name, table):
        self.name, self.doc, self.since = name, table['doc'], table.get('since', '')
        self.features = table.get('features', [])
        self.ours = table.get('ours', False)
        self.args = self.returns = None


class Event:
    def __init__(self, name, table):
        self.name, self.doc, self.since = name, table['doc'], table.get('since', '')
        self.ours = table.get('ours', False)
        self.data = None
        self.c = name.lower()


class Driver:
    def __init__(self, name, kind, table):
        self.name, self.kind, self.doc, self.since = name, kind, table['doc'], table.get('since', '')
        self.shares = isinstance(table.get('options'), str)
        self.options = None


# Reading fragments


class Schema:
    def __init__(self, paths):
        self.types = {}
        self.arrays = {}
        self.commands = []
        self.events = []
        self.drivers = []
        self.tables = {}  # type name -> (kind, table), until its members are read
        pending = []
        for path in paths:
            pending += self.read_fragment(path)
        self.declare_driver_enum()
        for kind, name, table in pending:
            self.resolve(kind, name, table)
        self.share_options()
        for t in list(self.types.values()):
            self.fill(t)
        self.order = self.in_order()

    def read_fragment(self, path):
        try:
            with open(path, 'rb') as f:
                tree = tomllib.load(f)
        except tomllib.TOMLDecodeError as e:
            raise SchemaError('%s: %s' % (path, e)) from e
        drivers = [n for k in DRIVER_KINDS for n in tree.get(k, {})]
        home = drivers[0] if drivers else None
        pending = []
        for kind, tables in tree.items():
            keys = KEYS.get('driver' if kind in DRIVER_KINDS else kind)
            if keys is None or kind == 'member':
                raise SchemaError('%s: unknown table [%s]' % (path, kind))
            for name, table in tables.items():
                where = '%s: %s.%s' % (path, kind, name)
                check_table(table, keys, where)
                if kind in ('command', 'event') or kind in DRIVER_KINDS:
                    pending.append((kind, name, table))
                    if kind in DRIVER_KINDS:
                        self.drivers.append(Driver(name, kind, table))
                else:
                    self.declare(kind, name, table, home, where)
        return pending

    def declare(self, kind, name, table, home, where):
        if name in self.types or name in Builtin.C or name in UINT_MAX:
            raise SchemaError('%s: the name is taken' % where)
        if kind == 'enum':
            new = Enum(name, table['values'], table, home)
        else:
            new = {'struct': Struct, 'union': Union, 'alternate': Alternate}[kind](name, table, home)
        self.types[name] = new
        self.tables[name] = (kind, table)
        return new

    def declare_driver_enum(self):
        if self.drivers:
            self.drivers.sort(key=lambda d: d.name)
            values = {d.name: d.doc for d in self.drivers}
            self.declare('enum', 'node-driver', {'doc': 'The drivers of nodes.', 'values': values}, None, 'drivers')

    def members_struct(self, name, members, doc, home, refused=None, features=()):
        table = {'doc': doc, 'members': members, 'refused': refused or {}, 'features': features}
        return self.declare('struct', name, table, home, name)

    def resolve(self, kind, name, table):
        if kind == 'command':
            self.resolve_command(name, table)
        elif kind == 'event':
            event = Event(name, table)
            if table.get('data'):
                event.data = self.members_struct(event.c.replace('_', '-') + '-event', table['data'],
                                                 'The data of %s.' % name, None)
            self.events.append(event)
        else:
            self.resolve_driver(name, table)

    def resolve_command(self, name, table):
        command = Command(name, table)
        args = table.get('arguments')
        if isinstance(args, str):
            command.args = self.lookup(args, name)
            if not isinstance(command.args, (Struct, Union)):
                raise SchemaError('%s: arguments are a struct or a union' % name)
        elif args:
            command.args = self.members_struct(name.replace('_', '-') + '-args', args,
                                               'The arguments of %s.' % name, None)
        if 'returns' in table:
            command.returns = self.lookup(table['returns'], name)
        self.commands.append(command)

    def resolve_driver(self, name, table):
        driver = next(d for d in self.drivers if d.name == name)
        options = table.get('options', {})
        if isinstance(options, str):
            driver.options = options
        else:
            driver.options = self.members_struct(name.replace('_', '-') + '-options', options,
                                                 'The options of driver %s.' % name, name,
                                                 table.get('refused'), table.get('features', []))

    def share_options(self):
        own = {d.name: d.options for d in self.drivers if not d.shares}
        for d in self.drivers:
            if d.shares and d.options not in own:
                raise SchemaError('%s: no options of driver %s' % (d.name, d.options))
            d.options = own[d.options] if d.shares else d.options

    def lookup(self, name, where):
        if isinstance(name, list):
            if len(name) != 1:
                raise SchemaError('%s: an array has one element type' % where)
            element = self.lookup(name[0], where)
            if isinstance(element, Array):
                raise SchemaError('%s: arrays of arrays are not supported' % where)
            array = Array(element)
            return self.arrays.setdefault(array.c, array)
        if name in Builtin.C or name in UINT_MAX or name == 'null':
            return Builtin(name)
        if name not in self.types:
            raise SchemaError('%s: no type %r' % (where, name))
        return self.types[name]

    def fill(self, t):
        kind, table = self.tables.pop(t.name, (None, None))
        if kind is None or kind == 'enum':
            return
        for name, member in table.get('members', {}).items():
            where = '%s.%s' % (t.name, name)
            check_table(member, KEYS['member'], where)
            type_ = self.lookup(member.get('type'), where)
            if isinstance(type_, Named) and type_.name in self.tables and member.get('default') == {}:
                self.fill(type_)
            t.members.append(Member(name, member, type_, where))
        if kind == 'union':
            self.fill_union(t, table)
        elif kind == 'alternate':
            self.fill_alternate(t)
        for name in t.refused:
            if name in [m.name for m in t.members]:
                raise SchemaError('%s: %s is refused and taken' % (t.name, name))

    def fill_union(self, t, table):
        t.tag = next((m for m in t.members if m.name == table['tag']), None)
        if t.tag is None or not isinstance(t.tag.type, Enum) or t.tag.optional:
            raise SchemaError('%s: the tag must be a mandatory or defaulted enum member' % t.name)
        variants = table['variants']
        if variants == 'drivers':
            variants = {d.name: d.options.name for d in self.drivers}
        for value, name in variants.items():
            if value not in t.tag.type.values:
                raise SchemaError('%s: %s is no value of %s' % (t.name, value, t.tag.type.name))
            variant = self.lookup(name, t.name)
            if not isinstance(variant, Struct):
                raise SchemaError('%s: variant %s is not a struct' % (t.name, value))
            self.fill(variant)
            if {m.name for m in variant.members} & {m.name for m in t.members}:
                raise SchemaError('%s: variant %s has a member twice' % (t.name, value))
        t.variants = {v: self.lookup(variants[v], t.name) if v in variants else None for v in t.tag.type.values}

    def fill_alternate(self, t):
        seen = set()
        for m in t.members:
            if m.type.json in seen or m.type.json in ('several', 'value') or m.optional or m.default is not None:
                raise SchemaError('%s.%s: each JSON type once, and no presence' % (t.name, m.name))
            seen.add(m.type.json)
            m.indirect = isinstance(m.type, (Struct, Union))

    def in_order(self):
        """All types, each after those that it holds by value."""
        done, order, doing = set(), [], []

        def visit(t):
            if isinstance(t, Builtin) or t.c in done:
                return
            if t.c in doing:
                raise SchemaError('%s holds itself: make the member optional' % t.name)
            doing.append(t.c)
            for other in t.complete_first():
                visit(other)
            doing.pop()
            done.add(t.c)
            order.append(t)

        for t in list(self.types.values()) + list(self.arrays.values()):
            visit(t)
        return order

    def holds_drivers(self, t, driver=None):
        """Whether a shared type needs a driver's header."""
        if isinstance(t, Builtin):
            return False
        if t.home is not None:
            return t.home != driver
        return any(self.holds_drivers(o) for o in t.complete_first())


def check_table(table, keys, where):
    if not isinstance(table, dict):
        raise SchemaError('%s: expected a table' % where)
    for key in table:
        if key not in keys:
            raise SchemaError('%s: unknown key %r' % (where, key))
    if not table.get('doc'):
        raise SchemaError('%s: lacks doc' % where)
    if 'values' in keys and not all(isinstance(d, str) and d for d in table.get('values', {0: ''}).values()):
        raise SchemaError('%s: lacks values with doc' % where)


# C types


def comment(text, indent=''):
    text = ' '.join(text.split()).replace('*/', '* /')
    line, lines = '', []
    for word in text.split():
        if len(indent) + len(line) + len(word) > 96:
            lines.append(line)
            line = ''
        line += (' ' if line else '') + word
    lines.append(line)
    if len(lines) == 1:
        return ['%s/* %s */' % (indent, lines[0])]
    return [indent + '/*'] + ['%s * %s' % (indent, x) for x in lines] + [indent + ' */']


def member_lines(m, indent='    '):
    lines = comment(m.doc, indent)
    if m.flag:
        lines.append('%sbool has_%s;' % (indent, m.c))
    lines.append('%s%s%s%s;' % (indent, m.type.c, '*' if m.indirect else '', m.c))
    return lines


def enum_lines(t):
    lines = comment(t.doc) + ['enum %s {' % c_name(t.name)]
    for value, doc in t.values.items():
        lines += comment(doc, '    ') + ['    %s,' % t.constant(value)]
    return lines + ['};']


def struct_lines(t):
    lines = comment(t.doc) + [t.c + '{']
    for m in t.members:
        lines += member_lines(m)
    if not t.members:
        lines += ['    char nothing; /* C has no empty structs */']
    if isinstance(t, Union):
        lines += ['    union {']
        for value, variant in t.variants.items():
            if variant:
                lines += ['        %s%s;' % (variant.c, c_name(value))]
        lines += ['    } u;']
    return lines + ['};']


def alternate_lines(t):
    lines = ['enum %s_kind {' % c_name(t.name)]
    lines += ['    %s_%s,' % (c_upper(t.name), c_upper(m.name)) for m in t.members]
    lines += ['};', ''] + comment(t.doc) + [t.c + '{', '    enum %s_kind kind;' % c_name(t.name), '    union {']
    for m in t.members:
        if m.type.name != 'null':
            lines += member_lines(m, '        ')
    return lines + ['    };', '};']


def array_lines(t):
    return [t.c + '{', '    %s*items;' % t.element.c, '    size_t count;', '};']


def inline_lines(t):
    """What users of a type need beside the type itself."""
    name = c_name(t.name) if isinstance(t, Named) else t.element.array_name + '_array'
    lines = ['extern const struct schema_type %s;' % t.descriptor, '']
    if isinstance(t, Enum):
        return lines + ['static inline const char *%s_name(%svalue)' % (name, t.c), '{',
                        '    return %s.values[value];' % t.descriptor, '}']
    return lines + ['/* Frees what the value holds; for AUTO(). */',
                    'static inline void %s_release(%s*value)' % (name, t.c), '{',
                    '    schema_free(&%s, value);' % t.descriptor, '}']


def type_lines(t):
    if isinstance(t, Enum):
        lines = enum_lines(t)
    elif isinstance(t, Alternate):
        lines = alternate_lines(t)
    elif isinstance(t, Array):
        lines = array_lines(t)
    else:
        lines = struct_lines(t)
    return lines + [''] + inline_lines(t) + ['']


def header(name, includes, lines):
    guard = 'CAIRN_GENERATED_%s_H' % c_upper(name)
    out = [HEAD + '#ifndef %s\n#define %s\n' % (guard, guard)]
    out += ['#include ' + i if i else '' for i in includes] + [''] + lines + ['#endif']
    return '\n'.join(out) + '\n'


def shared_header(schema, prefix):
    structs = sorted({t.c for t in schema.order if t.c.startswith('struct')})
    lines = [c.rstrip() + ';' for c in structs] + ['']
    for t in schema.order:
        if not t.home and not schema.holds_drivers(t):
            lines += type_lines(t)
    return header(prefix + '-shared', ['"base/schema.h"', '', '<jansson.h>'], lines)


def driver_header(schema, prefix, driver):
    lines = []
    for t in schema.order:
        if t.home == driver.name:
            if any(schema.holds_drivers(o, driver.name) for o in t.complete_first()):
                raise SchemaError('%s: uses a type of another driver' % t.name)
            lines += type_lines(t)
    return header(file_name(driver.options.name), ['"%s-shared.h"' % prefix], lines)


def types_header(schema, prefix):
    c = c_name(prefix)
    lines = []
    for t in schema.order:
        if not t.home and schema.holds_drivers(t):
            lines += type_lines(t)
    for e in schema.events:
        lines += comment(e.doc) + ['json_t *event_%s(%s);' % (c_name(e.c), event_parameter(e)), '']
    lines += ['/* All commands, by name. */',
              'extern const struct schema_command %s_commands[];' % c,
              'extern const size_t %s_command_count;' % c, '']
    if schema.drivers:
        lines += ['/* All drivers of nodes, in the order of enum node_driver. */',
                  'extern const struct schema_driver %s_drivers[];' % c,
                  'extern const size_t %s_driver_count;' % c, '']
    homes = sorted({d.options.name for d in schema.drivers})
    includes = ['"%s-shared.h"' % prefix] + ['"%s.h"' % file_name(h) for h in homes]
    return header(prefix + '-types', includes, lines)


def event_parameter(e):
    return 'const %s*data' % e.data.c if e.data else 'void'


# Descriptors


def number_literal(value):
    if value >= 2**63:
        return 'UINT64_C(%d)' % value
    if value == -2**63:
        return 'INT64_MIN'
    return 'INT64_C(%d)' % value if value < 0 else '%d' % value if value < 2**31 else 'UINT64_C(%d)' % value


def limits_initializer(m_min, m_max, unit=None, identifier=False):
    parts = []
    if m_min:
        parts.append('.min = %s' % number_literal(m_min).replace('UINT64_C', 'INT64_C'))
    if m_max:
        parts.append('.max = %s' % number_literal(m_max))
    if unit:
        parts.append('.unit = %s' % c_string(unit))
    if identifier:
        parts.append('.identifier = true')
    return '{%s}' % ', '.join(parts) if parts else None


def default_initializers(m):
    d = m.default
    if isinstance(d, bool):
        return ['.default_number = %d' % d] if d else []
    if isinstance(d, int) and d:
        return ['.default_number = %s' % (('(uint64_t)%s' if d < 0 else '%s') % number_literal(d))]
    if isinstance(m.type, Enum):
        return ['.default_number = %s' % m.type.constant(d)]
    return ['.default_string = %s' % c_string(d)] if isinstance(d, str) else []


def member_initializer(t, m):
    place = t.c.rstrip()
    presence = 'OPTIONAL' if m.optional else 'MANDATORY' if m.default is None else 'DEFAULT'
    parts = ['.name = %s' % c_string(m.name), '.type = &%s' % m.type.descriptor]
    if m.type.name != 'null':
        parts.append('.offset = offsetof(%s, %s)' % (place, m.c))
    parts.append('.flag_offset = %s' % ('offsetof(%s, has_%s)' % (place, m.c) if m.flag else 'SCHEMA_NO_FLAG'))
    parts.append('.presence = SCHEMA_%s' % presence)
    if m.indirect:
        parts.append('.indirect = true')
    limits = limits_initializer(m.min, m.max, m.unit, m.identifier)
    if limits:
        parts.append('.limits = %s' % limits)
    if m.default is not None:
        parts += default_initializers(m)
    return ['    {'] + ['        %s,' % p for p in parts] + ['    },']


def refusal_lines(t):
    name = c_name(t.name)
    if not t.refused:
        return []
    lines = ['static const struct schema_refusal %s_refusals[] = {' % name]
    lines += ['    {%s, %s},' % (c_string(n), c_string(' '.join(w.split()))) for n, w in sorted(t.refused.items())]
    return lines + ['    {NULL, NULL},', '};', '']


def variant_lines(t):
    lines = ['static const struct schema_variant %s_variants[] = {' % c_name(t.name)]
    for value, variant in t.variants.items():
        index = t.tag.type.constant(value)
        if variant:
            lines.append('    [%s] = {&%s, offsetof(%s, u.%s)},' % (index, variant.descriptor, t.c.rstrip(),
                                                                   c_name(value)))
        else:
            lines.append('    [%s] = {NULL, 0},' % index)
    return lines + ['};', '']


def descriptor_lines(t):
    name = c_name(t.name) if isinstance(t, Named) else None
    parts = ['.name = %s' % c_string(t.name)]
    lines = []
    if isinstance(t, Enum):
        lines += ['_Static_assert(sizeof(%s) == sizeof(unsigned), "enums are read as unsigned");' % t.c.rstrip(), '']
        lines += ['static const char *const %s_values[] = {' % name]
        lines += ['    [%s] = %s,' % (t.constant(v), c_string(v)) for v in t.values] + ['};', '']
        parts += ['.kind = SCHEMA_ENUM', '.count = %d' % len(t.values), '.values = %s_values' % name]
    elif isinstance(t, Array):
        parts += ['.kind = SCHEMA_ARRAY', '.element = &%s' % t.element.descriptor]
        probe = element_limits(t.element)
        if probe:
            parts.append('.element_limits = %s' % probe)
    else:
        kind = 'ALTERNATE' if isinstance(t, Alternate) else 'STRUCT'
        parts += ['.kind = SCHEMA_%s' % kind, '.count = %d' % len(t.members)]
        if t.members:
            lines += ['static const struct schema_member %s_members[] = {' % name]
            for m in t.members:
                lines += member_initializer(t, m)
            lines += ['};', '']
            parts.append('.members = %s_members' % name)
        if isinstance(t, Union):
            lines += variant_lines(t)
            parts += ['.tag = &%s_members[%d]' % (name, t.members.index(t.tag)), '.variants = %s_variants' % name]
    if isinstance(t, Named) and t.refused:
        lines = refusal_lines(t) + lines
        parts.append('.refusals = %s_refusals' % name)
    parts.insert(2, '.size = sizeof(%s)' % t.c.rstrip())
    return lines + ['const struct schema_type %s = {' % t.descriptor] + ['    %s,' % p for p in parts] + ['};', '']


def element_limits(element):
    if isinstance(element, Builtin) and (element.integer or element.name == 'string'):
        m = Member('element', {'doc': '-'}, element, 'element')
        return limits_initializer(m.min, m.max)
    return None


def event_lines(e):
    name = 'event_%s' % c_name(e.c)
    lines = ['json_t *%s(%s)' % (name, event_parameter(e)), '{']
    if e.data:
        lines += ['    return json_pack("{s:s, s:o}", "event", %s, "data", json_out(&%s, data));'
                  % (c_string(e.name), e.data.descriptor)]
    else:
        lines += ['    return json_pack("{s:s}", "event", %s);' % c_string(e.name)]
    return lines + ['}', '']


def sorted_commands(schema):
    return sorted(schema.commands, key=lambda c: c.name)


def types_source(schema, prefix):
    c = c_name(prefix)
    lines = [HEAD + '#include "%s-types.h"\n' % prefix, '#include "base/json-out.h"', '', '#include <stddef.h>', '']
    for t in schema.order:
        lines += descriptor_lines(t)
    for e in schema.events:
        lines += event_lines(e)
    lines += ['const struct schema_command %s_commands[] = {' % c]
    for command in sorted_commands(schema):
        args, ret = ('&' + t.descriptor if t else 'NULL' for t in (command.args, command.returns))
        lines += ['    {%s, %s, %s},' % (c_string(command.name), args, ret)]
    lines += ['};', '', 'const size_t %s_command_count = %d;' % (c, len(schema.commands))]
    if schema.drivers:
        lines += ['', 'const struct schema_driver %s_drivers[] = {' % c]
        for d in schema.drivers:
            lines += ['    {%s, SCHEMA_DRIVER_%s, &%s},' % (c_string(d.name), d.kind.upper(), d.options.descriptor)]
        lines += ['};', '', 'const size_t %s_driver_count = %d;' % (c, len(schema.drivers))]
    return '\n'.join(lines) + '\n'


# Dispatch


def handler(command):
    return 'qmp_' + c_name(command.name)


def handler_parameters(command):
    parts = ['struct qmp_session *session']
    if command.args:
        parts.append('const %s*args' % command.args.c)
    if command.returns:
        parts.append('%s*ret' % command.returns.c)
    return ', '.join(parts + ['struct error **err'])


def dispatch_header(schema, prefix):
    c = c_name(prefix)
    lines = ['/*', ' * A handler for each command. It may yield. What it puts into *ret, which is zeroed, is freed by the caller, on',
             ' * errors too.', ' */']
    for command in sorted_commands(schema):
        lines += ['int co_fn control_fn %s(%s);' % (handler(command), handler_parameters(command))]
    lines += ['', '/* By name. */', 'extern const struct qmp_command %s_dispatch[];' % c,
              'extern const size_t %s_dispatch_count;' % c, '',
              '/* What query-qmp-schema answers. */', 'extern const char %s_introspection[];' % c, '']
    return header(prefix + '-dispatch', ['"%s-types.h"' % prefix, '', '"control/qmp-protocol.h"'], lines)


def dispatch_source(schema, prefix):
    c = c_name(prefix)
    lines = [HEAD + '#include "%s-dispatch.h"\n' % prefix]
    for command in sorted_commands(schema):
        given = ['session'] + ['args'] * bool(command.args) + ['ret'] * bool(command.returns) + ['err']
        lines += ['static int co_fn control_fn call_%s(struct qmp_session *session, const void *args, void *ret,'
                  % c_name(command.name), '    struct error **err)', '{']
        lines += ['    (void)%s; /* it has none */' % x for x in ('args', 'ret') if x not in given]
        lines += ['    return %s(%s);' % (handler(command), ', '.join(given)), '}', '']
    lines += ['const struct qmp_command %s_dispatch[] = {' % c]
    for i, command in enumerate(sorted_commands(schema)):
        lines += ['    {&%s_commands[%d], call_%s},' % (c, i, c_name(command.name))]
    lines += ['};', '', 'const size_t %s_dispatch_count = %d;' % (c, len(schema.commands))]
    return '\n'.join(lines) + '\n'


# Introspection: QEMU's SchemaInfo, types named by numbers


class Introspection:
    def __init__(self, schema):
        self.numbers = {}
        self.entities = []
        self.empty = None
        for command in sorted_commands(schema):
            self.add(command.name, 'command', command.features,
                     {'arg-type': self.type(command.args), 'ret-type': self.type(command.returns)})
        for event in sorted(schema.events, key=lambda e: e.name):
            self.add(event.name, 'event', [], {'arg-type': self.type(event.data)})

    def add(self, name, meta, features, rest):
        entity = {'name': name, 'meta-type': meta} | rest
        if features:
            entity['features'] = list(features)
        self.entities.append(entity)

    def type(self, t):
        if t is None:
            if self.empty is None:
                self.empty = str(len(self.numbers))
                self.numbers[None] = self.empty
                self.add(self.empty, 'object', [], {'members': []})
            return self.empty
        if isinstance(t, Builtin):
            if t.wire not in self.numbers.values():
                self.numbers['builtin ' + t.wire] = t.wire
                self.add(t.wire, 'builtin', [], {'json-type': {'int': 'int', 'str': 'string', 'bool': 'boolean',
                                                               'any': 'value'}.get(t.wire, t.wire)})
            return t.wire
        if t.c in self.numbers:
            return self.numbers[t.c]
        if isinstance(t, Array):
            element = self.type(t.element)
            self.numbers[t.c] = '[%s]' % element
            self.add('[%s]' % element, 'array', [], {'element-type': element})
            return self.numbers[t.c]
        self.numbers[t.c] = str(len(self.numbers))
        self.describe(t, self.numbers[t.c])
        return self.numbers[t.c]

    def describe(self, t, number):
        if isinstance(t, Enum):
            self.add(number, 'enum', [], {'members': [{'name': v} for v in t.values], 'values': list(t.values)})
        elif isinstance(t, Alternate):
            self.add(number, 'alternate', [], {'members': [{'type': self.type(m.type)} for m in t.members]})
        else:
            rest = {'members': [self.member(m) for m in t.members]}
            if isinstance(t, Union):
                rest['tag'] = t.tag.name
                rest['variants'] = [{'case': v, 'type': self.type(s)} for v, s in t.variants.items()]
            self.add(number, 'object', t.features, rest)

    def member(self, m):
        entry = {'name': m.name, 'type': self.type(m.type)}
        if m.optional or m.default is not None:
            entry['default'] = None
        if m.features:
            entry['features'] = list(m.features)
        return entry


def introspect_source(schema, prefix):
    lines = [HEAD + '#include "%s-dispatch.h"\n' % prefix,
             'const char %s_introspection[] =' % c_name(prefix)]
    texts = [json.dumps(e) for e in Introspection(schema).entities]
    for i, text in enumerate(texts):
        lines.append('    %s' % c_string(('[' if i == 0 else '') + text + (']' if i == len(texts) - 1 else ',')))
    return '\n'.join(lines) + ';\n'


# The manual


def type_text(t):
    if isinstance(t, Array):
        return 'list of %s' % type_text(t.element)
    if isinstance(t, Builtin):
        return t.name
    return '[%s](#%s)' % (t.name, t.name)


def rule_text(m):
    rules = []
    if m.default is not None:
        rules.append('default %s' % json.dumps(m.default))
    elif m.optional:
        rules.append('optional')
    low = {'int': -2**63}.get(m.type.name, 0)
    high = {'int': 2**63 - 1, 'string': STRING_MAX}.get(m.type.name, UINT_MAX.get(m.type.name))
    if m.min != low:
        rules.append('at least %d' % m.min)
    if high is not None and m.max != high:
        rules.append('at most %d%s' % (m.max, ' bytes' if m.type.name == 'string' else ''))
    if m.unit:
        rules.append('in %s' % m.unit)
    if m.ours:
        rules.append('an addition of Cairn')
    return ', '.join(rules)


def cell(text):
    return ' '.join(text.split()).replace('|', '\\|')


def member_table(members):
    lines = ['| Member | Type | Rule | Meaning |', '|---|---|---|---|']
    for m in members:
        lines.append('| `%s` | %s | %s | %s |' % (m.name, type_text(m.type), cell(rule_text(m)), cell(m.doc)))
    return lines + ['']


def type_doc(t):
    lines = ['### %s' % t.name, '', ' '.join(t.doc.split()), '']
    if isinstance(t, Enum):
        lines += ['- `%s`: %s' % (v, cell(d)) for v, d in t.values.items()] + ['']
    elif t.members:
        lines += member_table(t.members)
    if isinstance(t, Union):
        for value, variant in t.variants.items():
            if variant:
                lines.append('With `%s` = `%s`, also the members of %s.' % (t.tag.name, value, type_text(variant)))
        lines.append('')
    lines += ['- not accepted: `%s`: %s' % (n, cell(w)) for n, w in sorted(t.refused.items())]
    return lines + [''] * bool(t.refused)


def command_doc(command):
    lines = ['### %s' % command.name, '', ' '.join(command.doc.split()), '']
    if command.ours:
        lines += ['An addition of Cairn.', '']
    if command.args and command.args.name.endswith('-args'):
        lines += member_table(command.args.members)
    elif command.args:
        lines += ['Arguments: %s.' % type_text(command.args), '']
    if command.returns:
        lines += ['Returns: %s.' % type_text(command.returns), '']
    return lines


def reference(schema):
    lines = ['# Reference of the control protocol', '', 'Made from the schema.', '', '## Commands', '']
    for command in sorted_commands(schema):
        lines += command_doc(command)
    lines += ['## Events', '']
    for e in sorted(schema.events, key=lambda e: e.name):
        lines += ['### %s' % e.name, '', ' '.join(e.doc.split()), '']
        lines += member_table(e.data.members) if e.data else []
    lines += ['## Drivers', '']
    for d in schema.drivers:
        lines += ['### Driver %s' % d.name, '', '%s (%s)' % (' '.join(d.doc.split()), d.kind), '',
                  'Options: %s.' % type_text(d.options), '']
    lines += ['## Types', '']
    hidden = {c.args.name for c in schema.commands if c.args and c.args.name.endswith('-args')}
    hidden |= {e.data.name for e in schema.events if e.data}
    for t in sorted((t for t in schema.types.values() if t.name not in hidden), key=lambda t: t.name):
        lines += type_doc(t)
    return '\n'.join(lines).rstrip() + '\n'




def outputs(schema, prefix):
    files = {
        prefix + '-shared.h': shared_header(schema, prefix),
        prefix + '-types.h': types_header(schema, prefix),
        prefix + '-types.c': types_source(schema, prefix),
        prefix + '-dispatch.h': dispatch_header(schema, prefix),
        prefix + '-dispatch.c': dispatch_source(schema, prefix),
        prefix + '-introspect.c': introspect_source(schema, prefix),
        prefix + '-reference.md': reference(schema),
    }
    for d in schema.drivers:
        if not d.shares:
            files[file_name(d.options.name) + '.h'] = driver_header(schema, prefix, d)
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--prefix', required=True)
    parser.add_argument('--out', required=True)
    parser.add_argument('fragments', nargs='+')
    args = parser.parse_args()
    try:
        files = outputs(Schema(args.fragments), args.prefix)
    except SchemaError as e:
        sys.exit('schema.py: %s' % e)
    os.makedirs(args.out, exist_ok=True)
    for name, text in files.items():
        with open(os.path.join(args.out, name), 'w', encoding='utf-8') as f:
            f.write(text)


if __name__ == '__main__':
    main()
