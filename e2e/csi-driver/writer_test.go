//go:build pool

package main

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

const recordSize = 4096

// writer writes records 0, 1, 2 … in turn to two volumes, each synced before the next is begun. So the
// only states that a cut may show are prefixes of the sequence.
type writer struct {
	begun, done atomic.Int64 // records
	stop        atomic.Bool
	err         error
	ended       sync.WaitGroup
}

func logFile(m *mounted, flag int) (*os.File, error) {
	if m.kind == block {
		return os.OpenFile(m.path, flag&^os.O_CREATE, 0)
	}
	return os.OpenFile(filepath.Join(m.path, "log"), flag, 0o600)
}

// startWriter first gives each volume enough data that copying it takes a while.
func startWriter(t *testing.T, a, b *mounted) *writer {
	t.Helper()
	w := &writer{}
	var files [2]*os.File
	for i, m := range []*mounted{a, b} {
		f, err := logFile(m, os.O_CREATE|os.O_WRONLY)
		if err == nil {
			err = ballast(m, f)
		}
		if err != nil {
			t.Fatal(err)
		}
		files[i] = f
	}
	w.ended.Go(func() {
		for i := int64(0); !w.stop.Load() && w.err == nil; i++ {
			w.begun.Store(i + 1)
			f := files[i%2]
			_, err := f.WriteAt(encode(i), i/2*recordSize)
			if w.err = errors.Join(err, f.Sync()); w.err == nil {
				w.done.Store(i + 1)
			}
		}
		w.err = errors.Join(w.err, files[0].Close(), files[1].Close())
	})
	return w
}

func (w *writer) finish(t *testing.T) {
	t.Helper()
	w.stop.Store(true)
	w.ended.Wait()
	if w.err != nil {
		t.Fatal(w.err)
	}
}

const (
	ballastSize = 64 << 20
	ballastAt   = 64 << 20 // on a raw block volume: behind the log
)

func ballast(m *mounted, log *os.File) error {
	data := make([]byte, ballastSize)
	if _, err := rand.Read(data); err != nil {
		return err
	}
	f, at := log, int64(ballastAt)
	if m.kind != block {
		var err error
		if f, err = os.Create(filepath.Join(m.path, "ballast")); err != nil {
			return err
		}
		defer f.Close()
		at = 0
	}
	_, err := f.WriteAt(data, at)
	return errors.Join(err, f.Sync()) // only what is in the image takes time to copy
}

func encode(i int64) []byte {
	b := make([]byte, recordSize)
	binary.LittleEndian.PutUint64(b, uint64(i)+1)
	binary.LittleEndian.PutUint32(b[recordSize-4:], crc32.ChecksumIEEE(b[:recordSize-4]))
	return b
}

// count reads how many records a volume holds; they are those of one parity and lie in order.
// Anything else in the log is an error.
func count(m *mounted, parity int64) (n int64, err error) {
	f, err := logFile(m, os.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var zero [recordSize]byte
	b := make([]byte, recordSize)
	for at := int64(0); at < ballastAt/recordSize; at++ {
		if _, err := io.ReadFull(io.NewSectionReader(f, at*recordSize, recordSize), b); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return 0, err
		}
		switch {
		case bytes.Equal(b, encode(2*at+parity)) && at == n:
			n++
		case m.kind == block && bytes.Equal(b, zero[:]): // never written
		default:
			return 0, fmt.Errorf("position %d of the log, after %d records, is not its record", at, n)
		}
	}
	return n, nil
}

// prefix checks that two volumes together show a prefix of the sequence, not shorter than what was
// done before the cut was asked for, nor longer than what had begun when it was over.
func prefix(a, b *mounted, done, begun int64) error {
	even, err := count(a, 0)
	if err != nil {
		return fmt.Errorf("first volume: %w", err)
	}
	odd, err := count(b, 1)
	if err != nil {
		return fmt.Errorf("second volume: %w", err)
	}
	if d := even - odd; d < 0 || d > 1 {
		return fmt.Errorf("no prefix: %d records in the first, %d in the second volume", even, odd)
	}
	if n := even + odd; n < done || n > begun {
		return fmt.Errorf("%d records, but %d were done before and %d begun after the cut", n, done, begun)
	}
	return nil
}
