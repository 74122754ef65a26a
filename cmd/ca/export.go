package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/ledger/export"
)

// maxExports bounds the list of exports: each has a batch of records in memory.
const maxExports = 16

var exportName = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,31}$`)

// configuredExport is one export whose settings are sound.
type configuredExport struct {
	name          string
	target        export.Target
	filter        export.Filter
	fromBeginning bool
}

// label names an export where it stands among other things: in the metrics of sinks
// and in conditions.
func (c configuredExport) label() string { return "export_" + c.name }

// exportTargets checks the list of exports, and makes their targets. It touches
// nothing but the files that settings name.
func exportTargets(v *validated, logger *slog.Logger) ([]configuredExport, error) {
	var problems []error
	bad := func(path, format string, args ...any) {
		problems = append(problems, v.file.Errorf(path, format, args...))
	}
	if len(v.Exports) > maxExports {
		bad("exports", "%d are too many; write %d at most", len(v.Exports), maxExports)
		return nil, errors.Join(problems...)
	}
	var list []configuredExport
	first := make(map[string]int)
	for i, s := range v.Exports {
		at := fmt.Sprintf("exports[%d]", i)
		c := configuredExport{name: s.Name}
		if !exportName.MatchString(s.Name) {
			bad(at+".name", "%q is no name of an export; write up to 32 of a-z, 0-9, _ and -, a letter first", s.Name)
		}
		if other, taken := first[s.Name]; taken {
			bad(at+".name", "%q is the name of exports[%d] already; write another one", s.Name, other)
		}
		first[s.Name] = i
		switch s.From {
		case "", "now":
		case "beginning":
			c.fromBeginning = true
		default:
			bad(at+".from", "%q is neither now nor beginning", s.From)
		}
		var err error
		if c.filter, err = export.NewFilter(s.Events, s.Outcomes); err != nil {
			if e, ok := errors.AsType[*export.SettingError](err); ok {
				bad(at+"."+e.Setting, "%s", e.Message)
			}
		}
		if c.target, err = exportTarget(v.file, at, s, logger.With("export", s.Name)); err != nil {
			problems = append(problems, err)
		}
		list = append(list, c)
	}
	return list, errors.Join(problems...)
}

// exportTarget makes the target of the one kind that is set.
func exportTarget(file *config.File, at string, s exportSettings, logger *slog.Logger) (export.Target, error) {
	var names, set []string
	var t export.Target
	var err error
	for _, k := range exportKinds {
		names = append(names, k.name)
		if section := k.section(s); section.Present() {
			set = append(set, k.name)
			t, err = k.open(section, logger)
		}
	}
	switch len(set) {
	case 0:
		return nil, file.Errorf(at, "where to is missing; write one of %s", strings.Join(names, ", "))
	case 1:
		return t, err
	default:
		return nil, file.Errorf(at, "%s are set; write one of them, and another export for the other", strings.Join(set, " and "))
	}
}

// exportConditions are the names of the conditions of exports.
func exportConditions(list []configuredExport) []string {
	names := make([]string, 0, len(list))
	for _, c := range list {
		names = append(names, c.label())
	}
	return names
}

// exportFeed is an export that goes on.
type exportFeed struct {
	*ledger.Feed
	report func(error)
}

// openExports opens the exports; run has to be called on each. One whose cursor
// cannot be used is reported and does nothing: nothing of an export stands in the
// way of issuing. It must be called before anything is appended to the journal, so
// that a new export gets all that is.
func openExports(ctx context.Context, dataDir string, list []configuredExport, j *ledger.Journal, m *ledger.FeedMetrics, t *health.Tracker, logger *slog.Logger) ([]exportFeed, error) {
	dir := filepath.Join(dataDir, "exports")
	names := make([]string, 0, len(list))
	for _, c := range list {
		names = append(names, c.name)
	}
	abandoned, err := export.Abandoned(dir, names)
	if err != nil {
		return nil, err
	}
	for _, path := range abandoned {
		logger.WarnContext(ctx, "an export is not configured any more and gets nothing; remove its cursor to forget it", "path", path)
	}
	var feeds []exportFeed
	for _, c := range list {
		report := func(err error) {
			if err == nil {
				t.Clear(c.label())
				return
			}
			t.Set(c.label(), health.Warning, err.Error())
		}
		x, err := export.New(j, c.target, export.Options{Dir: dir, Name: c.name, Filter: c.filter, FromBeginning: c.fromBeginning})
		if err != nil {
			report(err)
			logger.ErrorContext(ctx, "an export cannot begin", "err", err)
			continue
		}
		feeds = append(feeds, exportFeed{ledger.NewFeed(j, c.label(), x, m, ledger.FeedOptions{Logger: logger, OnState: report}), report})
	}
	return feeds, nil
}

// run feeds the export until ctx ends.
func (f exportFeed) run(ctx context.Context, logger *slog.Logger) {
	if err := f.Run(ctx); err != nil {
		f.report(err)
		logger.ErrorContext(ctx, "an export has ended", "err", err)
	}
}
