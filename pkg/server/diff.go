package server

import (
	"fmt"
	"strings"
)

// Bounds of a diff: above, the whole text is shown as replaced.
const (
	maxDiffLines = 1000
	diffContext  = 3
)

// unifiedDiff returns the difference of two short texts in the unified format,
// without file names; "" if there is none.
func unifiedDiff(before, after string) string {
	if before == after {
		return ""
	}
	a, b := splitLines(before), splitLines(after)
	ops := diffLines(a, b)
	var out strings.Builder
	for start := 0; start < len(ops); {
		// A hunk is a run of changes with at most twice the context between.
		for start < len(ops) && ops[start].kind == ' ' {
			start++
		}
		if start == len(ops) {
			break
		}
		end, quiet := start, 0
		for i := start; i < len(ops) && quiet <= 2*diffContext; i++ {
			if ops[i].kind == ' ' {
				quiet++
				continue
			}
			quiet, end = 0, i+1
		}
		from, to := max(0, start-diffContext), min(len(ops), end+diffContext)
		writeHunk(&out, ops[from:to])
		start = to
	}
	return out.String()
}

type lineOp struct {
	kind byte // ' ', '-' or '+'
	text string
	a, b int // lines before this one in each text
}

func writeHunk(out *strings.Builder, ops []lineOp) {
	na, nb := 0, 0
	for _, op := range ops {
		if op.kind != '+' {
			na++
		}
		if op.kind != '-' {
			nb++
		}
	}
	first := func(before, n int) int {
		if n == 0 {
			return before
		}
		return before + 1
	}
	fmt.Fprintf(out, "@@ -%d,%d +%d,%d @@\n", first(ops[0].a, na), na, first(ops[0].b, nb), nb)
	for _, op := range ops {
		out.WriteByte(op.kind)
		out.WriteString(op.text)
		out.WriteByte('\n')
	}
}

// diffLines returns the shortest way from a to b, by the longest common
// subsequence.
func diffLines(a, b []string) []lineOp {
	if len(a)+len(b) > maxDiffLines {
		ops := make([]lineOp, 0, len(a)+len(b))
		for i, line := range a {
			ops = append(ops, lineOp{'-', line, i, 0})
		}
		for j, line := range b {
			ops = append(ops, lineOp{'+', line, len(a), j})
		}
		return ops
	}
	common := make([][]int, len(a)+1) // of a[i:] and b[j:]
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var ops []lineOp
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			ops = append(ops, lineOp{' ', a[i], i, j})
			i, j = i+1, j+1
		case i < len(a) && (j == len(b) || common[i+1][j] >= common[i][j+1]):
			ops = append(ops, lineOp{'-', a[i], i, j})
			i++
		default:
			ops = append(ops, lineOp{'+', b[j], i, j})
			j++
		}
	}
	return ops
}

func splitLines(s string) []string {
	s = strings.TrimSuffix(s, "\n")
	if s == "" {
		return nil
	}
	return strings.Split(s, "\n")
}
