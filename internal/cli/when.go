package cli

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // --tz names zones also where none are installed
)

// Zone returns the time zone of this name: "local", "UTC", or one such as
// "Europe/Berlin".
func Zone(name string) (*time.Location, error) {
	switch strings.ToLower(name) {
	case "", "local":
		return time.Local, nil
	case "utc", "z":
		return time.UTC, nil
	}
	zone, err := time.LoadLocation(name)
	if err != nil {
		return nil, fmt.Errorf("time zone %q is not known; write local, UTC, or a name such as Europe/Berlin", name)
	}
	return zone, nil
}

// layouts are how people write a time without a zone.
var layouts = []string{"2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02"}

// Time reads a time: RFC 3339; date and time of day, or a date, in zone; "now"; or
// how long before now it was, as Duration reads it.
func Time(s string, now time.Time, zone *time.Location) (time.Time, error) {
	s = strings.TrimSpace(s)
	if s == "now" {
		return now, nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02 15:04:05Z07:00"} {
		if t, err := time.Parse(layout, s); err == nil {
			return bounded(t)
		}
	}
	for _, layout := range layouts {
		if t, err := time.ParseInLocation(layout, s, zone); err == nil {
			return bounded(t)
		}
	}
	if d, err := Duration(s); err == nil {
		return bounded(now.Add(-d))
	}
	return time.Time{}, fmt.Errorf("%q is no time: write how long ago (24h, 7d), local time (2026-11-25 14:00) or RFC 3339 (2026-11-25T14:00:00Z)", s)
}

// bounded refuses what cannot be counted in nanoseconds.
func bounded(t time.Time) (time.Time, error) {
	if t.Year() < 1970 || t.Year() > 2261 {
		return time.Time{}, fmt.Errorf("the year %d is out of range", t.Year())
	}
	return t, nil
}

// Duration reads a duration as time.ParseDuration does, and also days and weeks:
// 7d, 2w, 1d12h.
func Duration(s string) (time.Duration, error) {
	var total time.Duration
	rest := s
	for _, unit := range []struct {
		name string
		time.Duration
	}{{"w", 7 * 24 * time.Hour}, {"d", 24 * time.Hour}} {
		number, after, found := strings.Cut(rest, unit.name)
		if !found {
			continue
		}
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil || time.Duration(n) > 365*100*24*time.Hour/unit.Duration {
			return 0, fmt.Errorf("%q is not a duration; write one such as 90m, 24h or 7d", s)
		}
		total += time.Duration(n) * unit.Duration
		rest = after
	}
	if rest == "" && s != "" {
		return total, nil
	}
	d, err := time.ParseDuration(rest)
	if err != nil || d < 0 || d > 365*100*24*time.Hour {
		return 0, fmt.Errorf("%q is not a duration; write one such as 90m, 24h or 7d", s)
	}
	return total + d, nil
}
