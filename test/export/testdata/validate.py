"""validate.py FORMAT FILE: parses each line of FILE with a parser that is not ours,
and prints what it found, one JSON value a line. A line that is not valid ends it."""
import json
import sys

import jsonschema
import pycef
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema


def cef(line):
    found = pycef.parse(line)
    if found is None:
        raise ValueError("no CEF: " + line)
    return found


def ocsf():
    schema = OcsfJsonSchemaEmbedded(get_ocsf_schema(version="1.6.0"))
    validators = {}

    def validate(line):
        event = json.loads(line)
        uid = event["class_uid"]
        if uid not in validators:
            name = schema.lookup_class_name_from_uid(class_uid=uid)
            validators[uid] = jsonschema.Draft202012Validator(schema.get_class_schema(class_name=name, profiles=[]))
        problems = [f"{list(e.absolute_path)}: {e.message:.300}" for e in validators[uid].iter_errors(event)]
        if problems:
            raise ValueError(f"class {uid}: {problems} in {line:.600}")
        return event

    return validate


parse = cef if sys.argv[1] == "cef" else ocsf()
with open(sys.argv[2], "rb") as file:
    text = file.read().decode("utf-8", "strict")
# Every separator of lines that Python knows counts, not only line feeds.
for line in text.removesuffix("\n").splitlines():
    print(json.dumps(parse(line)))
