package cli

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// layouts are how people write a time without a zone.
var layouts = []string{
	"2006-01-02 15:04:05", "2006-01-02T15:04:05", "2006-01-02 15:04", "2006-01-02T15:04", "2006-01-02",
}

// Time reads a moment as people write it: how long ago ("90m", "24h", "7d"),
// RFC 3339, date and time of day or a date in zone ("2026-11-25 14:00",
// "2026-11-25"), or "now".
func Time(s string, now time.Time, zone *time.Location) (time.Time, error) {
	s = strings.TrimSpace(s)
	if s == "now" {
		return now, nil
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 15); err == nil {
			return now.AddDate(0, 0, -int(n)), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	for _, layout := range layouts {
		if t, err := time.ParseInLocation(layout, s, zone); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is no time: write how long ago (24h, 7d), local time (2026-11-25 14:00) or RFC 3339 (2026-11-25T14:00:00Z)", s)
}
