package cli

import (
	"encoding/csv"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// Cell returns s as a cell of a CSV file that a spreadsheet takes for text: what
// could begin a formula gets an apostrophe in front.
func Cell(s string) string {
	s = Printable(s)
	first, _ := firstRune(strings.TrimLeft(s, " "))
	if strings.ContainsRune("=+-@|%＝＋－＠", first) {
		return "'" + s
	}
	return s
}

func firstRune(s string) (rune, bool) {
	for _, r := range s {
		return r, true
	}
	return 0, false
}

// Rows writes a list of any length as it comes, in one of the formats "table",
// "csv", "json" (one array) and "jsonl". What was not chosen is not made.
type Rows struct {
	w      io.Writer
	format string
	header []string
	table  *tabwriter.Writer
	csv    *csv.Writer
	n      int
}

// NewRows returns Rows that write to w; header is that of tables and CSV files.
func NewRows(w io.Writer, format string, header ...string) *Rows {
	r := &Rows{w: w, format: format, header: header}
	switch format {
	case "table":
		r.table = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	case "csv":
		r.csv = csv.NewWriter(w)
	}
	return r
}

// Add writes one row: cells for tables and CSV files, object for JSON.
func (r *Rows) Add(cells func() []string, object func() ([]byte, error)) error {
	r.n++
	switch r.format {
	case "table":
		if r.n == 1 {
			fmt.Fprintln(r.table, strings.Join(r.header, "\t"))
		}
		row := cells()
		for i, c := range row {
			if row[i] = Printable(c); c == "" {
				row[i] = "-"
			}
		}
		fmt.Fprintln(r.table, strings.Join(row, "\t"))
		return nil
	case "csv":
		if r.n == 1 {
			if err := r.csv.Write(r.header); err != nil {
				return err
			}
		}
		row := cells()
		for i, c := range row {
			row[i] = Cell(c)
		}
		return r.csv.Write(row)
	default:
		line, err := object()
		if err != nil {
			return err
		}
		before, after := "", "\n"
		if r.format == "json" {
			before, after = ",\n", ""
			if r.n == 1 {
				before = "[\n"
			}
		}
		_, err = fmt.Fprintf(r.w, "%s%s%s", before, line, after)
		return err
	}
}

// Flush writes what was held back to align columns.
func (r *Rows) Flush() error {
	switch {
	case r.table != nil:
		return r.table.Flush()
	case r.csv != nil:
		r.csv.Flush()
		return r.csv.Error()
	default:
		return nil
	}
}

// Close ends the list. An empty table or CSV file has its header.
func (r *Rows) Close() error {
	if r.n == 0 && r.csv != nil {
		if err := r.csv.Write(r.header); err != nil {
			return err
		}
	}
	if r.format == "json" {
		end := "\n]\n"
		if r.n == 0 {
			end = "[]\n"
		}
		if _, err := io.WriteString(r.w, end); err != nil {
			return err
		}
	}
	return r.Flush()
}

// Len is the number of rows that were added.
func (r *Rows) Len() int { return r.n }
