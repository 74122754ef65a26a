// Package diff says in which lines two short texts differ. It does not know what
// the texts are.
package diff

import (
	"slices"
	"strings"
)

// maxLines bounds the work: texts that are longer are shown whole.
const maxLines = 1000

// Lines returns the lines of before and after, each with a leading "-" (only in
// before), "+" (only in after) or " " (in both). It returns "" if the texts are
// equal.
func Lines(before, after string) string {
	if before == after {
		return ""
	}
	a, b := split(before), split(after)
	var out strings.Builder
	line := func(mark byte, s string) {
		out.WriteByte(mark)
		out.WriteString(s)
		out.WriteByte('\n')
	}
	if len(a) > maxLines || len(b) > maxLines {
		for _, s := range a {
			line('-', s)
		}
		for _, s := range b {
			line('+', s)
		}
		return out.String()
	}
	// common[i][j] is the length of the longest common subsequence of a[i:]
	// and b[j:].
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i, x := range slices.Backward(a) {
		for j, y := range slices.Backward(b) {
			if x == y {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			line(' ', a[i])
			i++
			j++
		case j == len(b) || (i < len(a) && common[i+1][j] >= common[i][j+1]):
			line('-', a[i])
			i++
		default:
			line('+', b[j])
			j++
		}
	}
	return out.String()
}

func split(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(s, "\n"), "\n")
}
