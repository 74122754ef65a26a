package main

import (
	"context"
	"fmt"
	"time"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger"
)

// Conditions that are reported here: pkg/ca and pkg/ledger do not know of health.
const (
	conditionAuthority = "authority"
	conditionLedger    = "ledger"
)

// healthInterval is how often the authority and the journal are looked at.
const healthInterval = 5 * time.Second

// reportLedger keeps the condition of the ledger; it is ledger.Options.OnState.
func reportLedger(t *health.Tracker) func(error) {
	return func(err error) {
		if err != nil {
			t.Set(conditionLedger, health.Error, "nothing is issued: "+err.Error())
			return
		}
		t.Clear(conditionLedger)
	}
}

// watchHealth keeps the condition of the authority until ctx ends. A journal that can never be written again ends the program: it cannot
// know what is on the disk, and only opening the journal anew can tell.
func watchHealth(ctx context.Context, authority *ca.CA, journal *ledger.Journal, t *health.Tracker) error {
	ticker := time.NewTicker(healthInterval)
	defer ticker.Stop()
	for {
		switch warning, failure := authority.Health(time.Now()); {
		case failure != nil:
			t.Set(conditionAuthority, health.Error, failure.Error())
		case warning != nil:
			t.Set(conditionAuthority, health.Warning, warning.Error())
		default:
			t.Clear(conditionAuthority)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-journal.Broken():
			return fmt.Errorf("the ledger cannot be written any more: %w\n  Check the disk under data_dir, then start again", journal.Failed())
		case <-ticker.C:
		}
	}
}
