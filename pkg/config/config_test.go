package config

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

type sample struct {
	TrustDomain string   `yaml:"trust_domain"`
	TTL         Duration `yaml:"ttl"`
	Streams     int      `yaml:"streams"`
	Names       []string `yaml:"names"`
	CA          struct {
		Address string `yaml:"address"`
		Strict  bool   `yaml:"strict"`
	} `yaml:"ca"`
	Plugins struct {
		X509PoP Section `yaml:"x509pop"`
	} `yaml:"plugins"`
}

type plugin struct {
	Bundle string `yaml:"bundle"`
}

func decodeSample(name string, data []byte) (sample, plugin, error) {
	var s sample
	var p plugin
	f, err := Parse(name, data)
	if err != nil {
		return s, p, err
	}
	if err := f.Decode(&s); err != nil {
		return s, p, err
	}
	return s, p, s.Plugins.X509PoP.Decode(&p)
}

func TestDecode(t *testing.T) {
	s, p, err := decodeSample("a.yaml", []byte(`
trust_domain: example.org
ttl: 90m
streams: 12
names: [a, b]
ca:
  address: ca.example.org:8443
plugins:
  x509pop:
    bundle: /etc/ca.pem
`))
	if err != nil {
		t.Fatal(err)
	}
	if s.TTL.Or(0) != 90*time.Minute || s.Streams != 12 || s.CA.Address != "ca.example.org:8443" || p.Bundle != "/etc/ca.pem" {
		t.Errorf("decoded %+v and %+v", s, p)
	}
	if diff := cmp.Diff([]string{"a", "b"}, s.Names); diff != "" {
		t.Error(diff)
	}
}

// Each kind of mistake is a file testdata/*.bad.yaml; what the operator reads is
// the file *.golden beside it.
func TestV_K8_BadConfiguration(t *testing.T) {
	files, err := filepath.Glob("testdata/*.bad.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no bad files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = decodeSample(filepath.Base(file), data)
			if err == nil {
				t.Fatal("accepted")
			}
			e, ok := errors.AsType[*Error](err)
			if !ok || e.Line == 0 {
				t.Fatalf("%v: not an Error with a position", err)
			}
			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(err.Error()+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err2 := os.ReadFile(golden)
			if err2 != nil {
				t.Fatal(err2)
			}
			if diff := cmp.Diff(string(want), err.Error()+"\n"); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPositions(t *testing.T) {
	f, err := Parse("a.yaml", []byte("trust_domain: x\nca:\n  address: 'host:1'\n  strict: true\nnames:\n  - one\n  - two\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		path         string
		line, column int
	}{
		{"trust_domain", 1, 15},
		{"ca.address", 3, 12},
		{"names[1]", 7, 5},
		{"ca.missing", 3, 3},
	} {
		if line, column := f.Position(tc.path); line != tc.line || column != tc.column {
			t.Errorf("%s is at %d:%d, want %d:%d", tc.path, line, column, tc.line, tc.column)
		}
	}
	if line, column := f.Within("ca.address", 1, 3); line != 3 || column != 15 {
		t.Errorf("inside the quotes: %d:%d, want 3:15", line, column)
	}
	if got := f.Errorf("ca.address", "write host:port").Error(); got != "a.yaml:3:12: ca.address: write host:port" {
		t.Error(got)
	}
}

func TestV_I4_HugeOrDeep(t *testing.T) {
	for name, data := range map[string][]byte{
		"huge":        make([]byte, MaxBytes+1),
		"deep flow":   []byte("a: " + strings.Repeat("[", 100_000)),
		"deep braces": []byte(strings.Repeat("{a: ", 10_000)),
		"deep list":   []byte(strings.Repeat("- ", 100_000)),
		"deep keys":   []byte(strings.Repeat("? ", 100_000)),
		"documents":   []byte(strings.Repeat("---\na: b\n", maxDocuments+1)),
	} {
		if _, err := Parse(name, data); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzDecode(f *testing.F) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4096 {
			return
		}
		s, p, err := decodeSample("fuzz.yaml", data)
		if err != nil {
			if _, ok := errors.AsType[*Error](err); !ok {
				t.Errorf("%T: %v", err, err)
			}
			return
		}
		_, _ = s, p
	})
}
