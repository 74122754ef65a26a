package cli

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// JSON writes v, indented. A protobuf message has its field names as they are
// in the .proto file, and bytes as lower-case hexadecimal, as serials and
// fingerprints are written everywhere else.
func JSON(w io.Writer, v any) error {
	var data []byte
	var err error
	if m, ok := v.(proto.Message); ok {
		data, err = MarshalJSON(m)
	} else {
		data, err = json.Marshal(v)
	}
	if err != nil {
		return err
	}
	var indented bytes.Buffer
	if err := json.Indent(&indented, data, "", "  "); err != nil {
		return err
	}
	indented.WriteByte('\n')
	_, err = w.Write(indented.Bytes())
	return err
}

// MarshalJSON renders a message as JSON does, on one line.
func MarshalJSON(m proto.Message) ([]byte, error) {
	data, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var tree any
	if err := d.Decode(&tree); err != nil {
		return nil, err
	}
	toHex(m.ProtoReflect().Descriptor(), tree)
	return json.Marshal(tree)
}

// toHex rewrites the bytes fields of a message in its JSON tree.
func toHex(d protoreflect.MessageDescriptor, tree any) {
	object, ok := tree.(map[string]any)
	if !ok {
		return
	}
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		v, present := object[string(f.Name())]
		if !present || v == nil {
			continue
		}
		switch {
		case f.IsMap():
			if m, ok := v.(map[string]any); ok && f.MapValue().Message() != nil {
				for _, e := range m {
					toHex(f.MapValue().Message(), e)
				}
			}
		case f.Kind() == protoreflect.BytesKind:
			object[string(f.Name())] = hexAll(v)
		case f.IsList() && f.Message() != nil:
			if l, ok := v.([]any); ok {
				for _, e := range l {
					toHex(f.Message(), e)
				}
			}
		case f.Message() != nil:
			toHex(f.Message(), v)
		}
	}
}

func hexAll(v any) any {
	switch v := v.(type) {
	case string:
		raw, err := base64.StdEncoding.DecodeString(v)
		if err != nil {
			return v
		}
		return hex.EncodeToString(raw)
	case []any:
		for i := range v {
			v[i] = hexAll(v[i])
		}
	}
	return v
}
