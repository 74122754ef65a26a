package export

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
)

// validate parses the lines of all records with testdata/validate.py.
func validate(t *testing.T, format string) []map[string]any {
	t.Helper()
	python := cached(t, "validators/bin/python", "install-validators")
	var text bytes.Buffer
	for i, r := range records(1 << 13) {
		line, _ := export.Encode(formats[format], ledger.Entry{Index: uint64(i), Record: r}, 16<<20)
		text.Write(append(line, '\n'))
	}
	path := filepath.Join(t.TempDir(), "lines")
	if err := os.WriteFile(path, text.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), python, "testdata/validate.py", format, path).Output()
	if err != nil {
		if e, ok := err.(*exec.ExitError); ok { //nolint:errorlint // Output returns it as it is
			t.Fatalf("%v\n%s", err, e.Stderr)
		}
		t.Fatal(err)
	}
	var all []map[string]any
	for s := scanner(bytes.NewReader(out)); s.Scan(); {
		var event map[string]any
		if err := json.Unmarshal(s.Bytes(), &event); err != nil {
			t.Fatal(err)
		}
		all = append(all, event)
	}
	if len(all) != len(records(1)) {
		t.Fatalf("%d events in the lines of %d records", len(all), len(records(1)))
	}
	return all
}

// Each record is one event, and no text in it makes a
// field.
func TestCEFIsParsedByAnother(t *testing.T) {
	known := make(map[string]bool)
	for i, event := range validate(t, "cef") {
		if event["externalId"] != strconv.Itoa(i) || event["DeviceVendor"] != "meshid" || event["DeviceProduct"] != "ca" {
			t.Errorf("record %d: %v", i, event)
		}
		for key := range event {
			known[key] = true
		}
	}
	if len(known) > 40 {
		t.Errorf("%d different fields: some are not ours: %v", len(known), known)
	}
}

// Each record is an event that the schema allows, and has its record.
func TestOCSFKeepsToTheSchema(t *testing.T) {
	classes := make(map[string]int)
	for i, event := range validate(t, "ocsf") {
		if sequence := event["metadata"].(map[string]any)["sequence"]; sequence != float64(i) {
			t.Errorf("record %d: sequence %v", i, sequence)
		}
		if index := event["unmapped"].(map[string]any)["index"]; index != float64(i) {
			t.Errorf("record %d: index %v", i, index)
		}
		classes[fmt.Sprint(event["class_uid"])]++
	}
	for _, class := range []string{"0", "3002", "3004", "6002", "6003"} {
		if classes[class] == 0 {
			t.Errorf("no event of class %s", class)
		}
	}
}
