package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/pkg/identity"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"
)

// entryYAML is a registration entry as it stands in a file.
type entryYAML struct {
	Name       string          `yaml:"name"`
	SPIFFEID   string          `yaml:"spiffe_id"`
	Nodes      string          `yaml:"nodes"`
	Workloads  string          `yaml:"workloads"`
	TTL        config.Duration `yaml:"ttl"`
	DNSNames   []string        `yaml:"dns_names"`
	Hint       string          `yaml:"hint"`
	Admin      bool            `yaml:"admin"`
	Downstream bool            `yaml:"downstream"`
	AcceptWeak bool            `yaml:"accept_weak"`
}

func (e *entryYAML) proto() *entryv1.Entry {
	p := &entryv1.Entry{
		Name: e.Name, SpiffeId: e.SPIFFEID, Nodes: e.Nodes, Workloads: e.Workloads,
		DnsNames: e.DNSNames, Hint: e.Hint, Admin: e.Admin, Downstream: e.Downstream, AcceptWeak: e.AcceptWeak,
	}
	if e.TTL != 0 {
		p.Ttl = durationpb.New(e.TTL.Or(0))
	}
	return p
}

const maxProblems = 50

// readEntries reads registration entries from a file, from all *.yaml files of
// a folder, or from stdin for "-". Each file holds a list of entries, or one
// entry a document. With a trust domain, the entries are compiled too, and what
// is wrong is reported with its place in the file; all mistakes are returned
// together, those of maxProblems entries at most.
func readEntries(path string, stdin io.Reader, td spiffeid.TrustDomain) ([]*entryv1.Entry, error) {
	sources, err := entrySources(path, stdin)
	if err != nil {
		return nil, err
	}
	var entries []*entryv1.Entry
	var problems []error
	places := make(map[string]string)
	for _, source := range sources {
		documents, err := config.ParseAll(source.name, source.data)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		for _, document := range documents {
			for _, file := range document.List() {
				e, err := readEntry(file, td)
				if err != nil {
					problems = append(problems, err)
					continue
				}
				line, _ := file.Position("name")
				place := fmt.Sprintf("%s:%d", source.name, line)
				if before, twice := places[e.GetName()]; twice {
					problems = append(problems, file.Errorf("name", "entry %q is also at %s; names are unique", e.GetName(), before))
				}
				places[e.GetName()] = place
				entries = append(entries, e)
			}
		}
	}
	if n := len(problems); n > maxProblems {
		problems = append(problems[:maxProblems], fmt.Errorf("and %d more entries with mistakes", n-maxProblems))
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		return nil, fmt.Errorf("%s: no entries in it", path)
	}
	return entries, nil
}

func readEntry(file *config.File, td spiffeid.TrustDomain) (*entryv1.Entry, error) {
	var y entryYAML
	if err := file.Decode(&y); err != nil {
		return nil, err
	}
	e := y.proto()
	if td.IsZero() {
		return e, nil
	}
	_, err := identity.Compile(td, e)
	var bad *identity.EntryError
	switch {
	case err == nil:
		return e, nil
	case !errors.As(err, &bad):
		return nil, err
	}
	var problems []error
	for _, f := range bad.Fields {
		message := f.Message
		if f.Hint != "" {
			message += "; " + f.Hint
		}
		out := &config.Error{File: file.Name(), Field: f.Field, Message: message}
		out.Line, out.Column = file.Within(f.Field, f.Line, f.Column)
		problems = append(problems, out)
	}
	return nil, errors.Join(problems...)
}

type entrySource struct {
	name string
	data []byte
}

func entrySources(path string, stdin io.Reader) ([]entrySource, error) {
	if path == "-" {
		data, err := io.ReadAll(io.LimitReader(stdin, config.MaxBytes+1))
		if err != nil {
			return nil, fmt.Errorf("read entries from standard input: %w", err)
		}
		return []entrySource{{"stdin", data}}, nil
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read entries: %w", err)
	}
	paths := []string{path}
	if st.IsDir() {
		if paths, err = filepath.Glob(filepath.Join(path, "*.yaml")); err != nil {
			return nil, err
		}
		if len(paths) == 0 {
			return nil, fmt.Errorf("read entries: no *.yaml file in %s", path)
		}
		slices.Sort(paths)
	}
	sources := make([]entrySource, 0, len(paths))
	for _, p := range paths {
		data, err := os.ReadFile(p)
		if err != nil {
			return nil, fmt.Errorf("read entries: %w", err)
		}
		sources = append(sources, entrySource{p, data})
	}
	return sources, nil
}
