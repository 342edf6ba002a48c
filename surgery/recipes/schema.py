"""The JSON schema of recipes, by which editors complete and check them."""

from __future__ import annotations

from typing import Any

from surgery.host.manager import Host
from surgery.recipes import definitions
from surgery.recipes.definitions import Definition

_TEXT = {'type': 'string'}
_NAME = '^[A-Za-z_][A-Za-z0-9_]*$'
_VARIABLE = {'type': 'string', 'pattern': r'^\$\{[A-Za-z_][A-Za-z0-9_]*\}$'}

# Outputs of recipes: a file alone, or with options.
_OUTPUT: dict[str, Any] = {
  'anyOf': [
    {'type': ['string', 'null']},
    {
      'type': 'object',
      'properties': {
        'path': {
          'type': ['string', 'null'],
          'description': 'The file, or a new folder: out/.',
        },
        'of': {**_TEXT, 'description': 'Alias of what is written.'},
        'format': {
          **_TEXT,
          'description': 'Format; by default the suffix decides.',
        },
        'shard-size': {
          'type': ['string', 'integer'],
          'description': 'Largest size of each file: 5GB, 64MiB.',
        },
        'strict-flax': {
          'type': 'boolean',
          'description': 'Write what flax would, without a manifest.',
        },
        'manifest': {
          'type': 'boolean',
          'description': 'Whether flags, digests, history and so on are '
          'written.',
        },
        'metadata': {
          'type': 'object',
          'additionalProperties': _TEXT,
          'description': 'Metadata for other programs.',
        },
        'config': {
          'type': 'object',
          'description': 'Values for the config.json of a folder.',
        },
        'like': {
          **_TEXT,
          'description': 'Model folder whose configuration, tokenizer '
          'and licences are copied.',
        },
      },
      'additionalProperties': False,
    },
  ]
}


def schema(host: Host) -> dict[str, Any]:
  """Returns the schema of recipes with the steps that a host has.

  Args:
    host: whose passes there are.

  Returns:
    A JSON schema, draft 2020-12.
  """
  steps = definitions.every(host)
  top: dict[str, Any] = {
    'type': 'object',
    'properties': {
      'about': {'description': 'A description; not read.'},
      'inputs': {
        'type': 'object',
        'description': 'Files by alias; null if they are named when it is run. '
        'Steps change the first.',
        'propertyNames': {'pattern': _NAME},
        'additionalProperties': {'type': ['string', 'null']},
        'minProperties': 1,
      },
      'vars': {
        'type': 'object',
        'description': 'Values for ${name} in steps.',
        'propertyNames': {'pattern': _NAME},
      },
      'steps': {'$ref': '#/$defs/steps'},
      'outputs': {
        'type': 'object',
        'description': 'Files, or options, by name.',
        'propertyNames': {'pattern': _NAME},
        'additionalProperties': {'$ref': '#/$defs/output'},
      },
    },
    'required': ['steps'],
    'additionalProperties': False,
  }
  return {
    '$schema': 'https://json-schema.org/draft/2020-12/schema',
    'title': 'A recipe of surgery',
    'anyOf': [top, {'$ref': '#/$defs/steps'}],
    '$defs': {
      'steps': {
        'type': 'array',
        'items': {
          'anyOf': [
            *(_step(one) for one in steps.values()),
            {'enum': [n for n, one in steps.items() if _alone(one)]},
          ]
        },
      },
      'output': _OUTPUT,
    },
  }


def _alone(step: Definition) -> bool:
  return not any(one.required for one in step.options.values())


def _step(step: Definition) -> dict[str, Any]:
  options = {
    one.name: {
      'anyOf': [definitions.schema(one.annotation), _VARIABLE],
      'description': one.doc,
    }
    for one in step.options.values()
  }
  ways: list[dict[str, Any]] = [
    {
      'type': 'object',
      'properties': options,
      'required': [o.name for o in step.options.values() if o.required],
      'additionalProperties': False,
    }
  ]
  if step.first is not None:
    others = [
      o.name
      for o in step.options.values()
      if o.required and o is not step.first
    ]
    if not others:
      ways.append(options[step.first.name])
  if _alone(step):
    ways.append({'type': 'null'})
  return {
    'type': 'object',
    'description': step.summary,
    'properties': {
      step.name: {'anyOf': ways, 'description': step.summary},
      'in': {**_TEXT, 'description': 'Alias of the model that it changes.'},
      'as': {**_TEXT, 'description': 'Alias of its result.'},
    },
    'required': [step.name],
    'additionalProperties': False,
  }
