package console

import (
	"fmt"
	"math"
	"time"
)

// chart is a bar chart as SVG: rectangles in a box of chartWidth × chartHeight that
// the page stretches, so that text stands beside it and not in it.
type chart struct {
	Width, Height int
	Label         string // what it shows, for who cannot see it
	Bars          []bar
	Lines         []int // heights of the lines of the grid, from the top
	Top           string
	From, To      string
	Legend        []legend
}

type bar struct {
	X, W  string
	Title string
	Parts []part
}

type part struct {
	Class string
	Y, H  string
}

type legend struct {
	Name  string
	Total uint64
}

const (
	chartWidth  = 720
	chartHeight = 120
)

// slot is one step of time with its values, in the order of the series.
type slot struct {
	title  string
	values []uint64
}

// newChart draws slots with the series stacked. A series' name is its class too.
func newChart(label string, series []string, slots []slot, from, to string) chart {
	c := chart{Width: chartWidth, Height: chartHeight, Label: label, From: from, To: to}
	totals := make([]uint64, len(series))
	var highest uint64
	for _, s := range slots {
		var sum uint64
		for i, v := range s.values {
			sum += v
			totals[i] += v
		}
		highest = max(highest, sum)
	}
	top := niceTop(highest)
	c.Top = count(top)
	c.Lines = []int{1, chartHeight / 2, chartHeight - 1}
	width := float64(chartWidth) / float64(max(len(slots), 1))
	for i, s := range slots {
		b := bar{X: number(float64(i)*width + width*0.1), W: number(width * 0.8), Title: s.title}
		y := float64(chartHeight)
		for k, name := range series {
			v := s.values[k]
			if v == 0 {
				continue
			}
			// One is seen beside a thousand.
			h := max(float64(v)/float64(top)*chartHeight, 2)
			y -= h
			b.Parts = append(b.Parts, part{name, number(y), number(h)})
		}
		c.Bars = append(c.Bars, b)
	}
	for i, name := range series {
		c.Legend = append(c.Legend, legend{name, totals[i]})
	}
	return c
}

func number(f float64) string { return fmt.Sprintf("%.2f", f) }

// niceTop is the end of an axis: 1, 2 or 5 times a power of ten.
func niceTop(n uint64) uint64 {
	if n <= 1 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(float64(n))))
	for _, m := range []float64{1, 2, 5, 10} {
		if m*power >= float64(n) {
			return uint64(m * power)
		}
	}
	return n
}

// span is a stretch of time that a chart shows.
type span struct {
	Name, Text string
	Length     time.Duration
	Step       time.Duration
}

var spans = []span{
	{"1h", "the last hour", time.Hour, time.Minute},
	{"24h", "the last 24 hours", 24 * time.Hour, 20 * time.Minute},
	{"7d", "the last 7 days", 7 * 24 * time.Hour, 2 * time.Hour},
	{"30d", "the last 30 days", 30 * 24 * time.Hour, 12 * time.Hour},
}

func spanNamed(name string) span {
	for _, s := range spans {
		if s.Name == name {
			return s
		}
	}
	return spans[1]
}
